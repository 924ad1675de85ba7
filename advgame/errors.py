"""The one exception for input that a person can mend."""


class InputError(ValueError):
    """Bad input, found before any work started; the message is one line that says what to do.

    Scripts print it without a traceback and exit with code 2.
    """
