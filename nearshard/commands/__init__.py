"""The words of the ``nearshard`` command: a module each, or for some that belong together, with an ``add_to(app)``.

Only the module of the word that is typed is imported, so that a short command starts fast.
"""
