"""The former place of `pixio.models.uniception`, kept for one version."""

import warnings

from pixio.models.uniception import *  # noqa: F403

warnings.warn("pixio.uniception is now pixio.models.uniception", DeprecationWarning, stacklevel=2)
