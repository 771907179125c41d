"""The one error that means: the user can mend this."""


class InputError(ValueError):
    """Bad input: the message says in one line what was found where, what was expected, and the remedy.

    Stages print the message without a traceback and exit with 1. Anything else that is raised is a defect of ours.
    """
