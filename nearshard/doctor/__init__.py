"""``nearshard doctor``: what of this machine and its network slows transfers, and how to mend it.

``facts`` (what was found), ``checks`` (the table, and how each fact is judged) and ``mending`` (what the files of
``--apply`` say) are pure; ``machine`` and ``network`` find facts; ``apply`` changes the machine.
"""
