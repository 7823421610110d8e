"""The errors that a user can mend. The command line prints them as one paragraph and exits with their code.

Each message says what happened, where, and what to do. Everything else is a defect of ours and shows its traceback.
"""


class UserError(Exception):
    """Bad input: data, a recipe or an option is wrong. Exit code 2."""

    exit_code = 2


class Refusal(UserError):
    """The request is well formed, but going on would be wrong or unsafe. Exit code 3."""

    exit_code = 3


class StaleArtifact(Refusal):
    """An artifact exists that was built from other fields than the recipe now asks for."""


class RootInUse(Refusal):
    """Another process is working on the same recipe below the same root."""


class IsolationUnavailable(Refusal):
    """Model-written code would have to run without isolation."""
