"""`mxgate explain`: what the gateway would make of a message, and why; or what it made of one, judged again.

`run` puts a message through the gatekeeper, the pipeline and the policies that `mxgate serve` runs, `replay` a decision
record; `stand_ins` are what they have in place of the world, `ask` is DNS, `given` and `mail_file` read what the
command is given, `lines` is for people. `stored` and `compare` are `mxgate replay`, which does both for many messages
and up to two configurations. No mail is delivered, no state is touched, and no socket is opened but for DNS; the replay
of a record asks nobody.
"""
