"""Tests in a folder for each package; small models and helpers that several files use are in `tests.toys`."""

# The import hook that pytest's --jaxtyping-packages installs imports `tests` and then looks up `tests.shapes.checked`.
from tests import shapes as shapes
