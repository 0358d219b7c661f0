"""Every exception that this project raises on purpose.

    SoftPromptError
    ├── ConfigError            a setting is unknown, of the wrong type or contradicts another
    ├── DataError              a dataset file, a task or a DoD cannot be used as it is
    ├── ArtifactError          a soft prompt, bank, translator or payload is damaged or of the wrong shape
    │   └── BaseModelMismatch  two artifacts that meet belong to different base models
    ├── BaseModelError         a base model cannot be found or loaded
    ├── BusyError              another process is working on the same output
    ├── RegistryError          the registry refuses or cannot find something
    │   └── PromotionRefused   a promotion rule failed
    └── LanguageModelError     a target LLM failed; says whether a new try can help

A message has four parts: what was being done, what was found, what was expected, what to do.
"""

from __future__ import annotations


class SoftPromptError(Exception):
    """Base of every error that is meant to be read by a user."""


class ConfigError(SoftPromptError):
    """A setting is unknown, of the wrong type, or contradicts another setting."""


class DataError(SoftPromptError):
    """A dataset file, a task or a DoD cannot be used as it is."""


class ArtifactError(SoftPromptError):
    """A stored or received artifact is damaged, has the wrong shape, or is of another format version."""


class BaseModelMismatch(ArtifactError):
    """Two things that must share a base model do not; both are named in the message."""


class BaseModelError(SoftPromptError):
    """A base model cannot be found or loaded."""


class BusyError(SoftPromptError):
    """Another process holds the lock of the output that was asked for."""


class RegistryError(SoftPromptError):
    """The registry refuses a request or cannot find what was named."""


class PromotionRefused(RegistryError):
    """A promotion rule failed; the message lists each rule with its number."""


class LanguageModelError(SoftPromptError):
    """A language model behind an API failed.

    `retryable` says whether the same request can succeed later; `about_request` whether it is this one request that is
    refused, while others may pass; `hint` says what to do. The provider's own exception stays reachable as `__cause__`,
    without the request's headers.
    """

    def __init__(self, message: str, *, retryable: bool, hint: str, about_request: bool = False) -> None:
        super().__init__(f"{message} {hint}")
        self.retryable = retryable
        self.about_request = about_request
        self.hint = hint
