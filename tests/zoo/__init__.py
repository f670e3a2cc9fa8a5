"""The model zoo: small random-weight transformers of every family that tokopt must handle or refuse.

>>> entry = ZOO["vit"]                                                # doctest: +SKIP
>>> model, inputs = entry.build(), entry.inputs(5)                    # doctest: +SKIP
>>> tokopt.capture(model, (), inputs, dynamic=entry.dynamic)          # doctest: +SKIP
"""

from tests.zoo.entries import ZOO, Entry

__all__ = ["ZOO", "Entry"]
