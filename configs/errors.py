"""What the user got wrong: the one error family that ends a command with exit code 2."""


class UserError(ValueError):
    """A mistake in what the user wrote, found before any work starts.

    The message says what was given, what was expected and what to do. The command line prints it
    without a traceback and exits with 2.
    """


class ConfigError(UserError):
    """A configuration key that is unknown, of a wrong type, or impossible beside the others."""
