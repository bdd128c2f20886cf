"""Read results of probes further: significance, baselines, transfer, alignment, lens, trajectory."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
