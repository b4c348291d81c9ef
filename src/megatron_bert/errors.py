"""The errors that are told to a person in one line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the person who runs the program can put right.

    The message is one line that says what is wrong, where (the file, line, key or value) and what to do about it.
    The command prints it as ``megatron-bert VERB: error: MESSAGE`` and ends with exit code 2; library callers see an
    ordinary ``ValueError``.
    """


class SharedError(UserError):
    """A mistake that every process of a run has been told of, so that one of them can say it for all."""


class LostProcess(RuntimeError):
    """Another process of the run ended or does not answer. Nothing is wrong with this one."""
