"""TransformNet: three trained weights in place of a fixed image pipeline, and the measurements to judge it by.

The names below are imported when first used, so that `import transformnet_lib` alone is quick and does nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "benchmarking": ["benchmark"],
        "dataset": ["CustomDataset", "batch_loader"],
        "folding": ["FoldedTransform", "fold"],
        "identification": ["NotSeparable", "identify"],
        "images": ["load_images"],
        "methods": ["test_inference_time"],
        "model": ["TransformNet"],
        "normal_equations": ["least_squares"],
        "pipeline": ["GRAY_WEIGHTS", "Pipeline"],
        "run": ["Run", "read_run", "read_runs", "scratch_run"],
        "separable": ["Separable"],
        "stages": ["benchmark_stage", "compare_stage", "seeds_stage", "study_stage", "train_stage"],
        "training": ["EarlyStopping", "TrainConfig", "train"],
    },
)
