"""The chat, from an app's export to the rows that a model is trained on."""

import models  # noqa: F401 (it checks Python and the packages, before anything here needs them)
