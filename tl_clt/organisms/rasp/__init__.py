"""Programs in RASP that Tracr compiled to weights (Lindner et al. 2023, "Tracr: Compiled Transformers"), and how."""
