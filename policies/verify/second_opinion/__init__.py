"""What independent verifiers say of a message, and which differences from ours are known: pyspf and dkimpy.

    spf: pyspf          signatures: dkimpy, DKIM and ARC          answers: what DNS said, and nothing else

They ask nobody: each question is answered from what the decision has asked already. They block, so they run in a thread
(policies/crosscheck.py) or in a test. Both libraries come with the extra `crosscheck`.
"""
