"""`mxgate plugin`: for authors of policies.

`new` makes a package of its own for a policy, `listing` says which policies there are, `trial` runs the contract suite
(gateway.testing.contract) on the policies of a file, a source tree or a wheel, `reference` is the page of public names.
"""
