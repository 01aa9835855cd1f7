"""The two ways a request can end badly, each told to the person in one sentence."""


class LsqError(Exception):
    """The work could not be done; the message is one sentence: what, where, what to do.

    The command line prints it and exits with 1; the app shows it in place of the result.
    """

    exit_code = 1


class InputError(LsqError):
    """What was asked for cannot be: a wrong path, an unreachable budget, an unknown name.

    The command line exits with 2.
    """

    exit_code = 2
