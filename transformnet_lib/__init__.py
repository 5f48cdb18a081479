"""TransformNet: three trained weights in place of a fixed image pipeline, and the measurements to judge it by.

The names below are imported when first used, so that `import transformnet_lib` alone is quick and does nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dataset": ["CustomDataset", "batch_loader"],
        "images": ["load_images"],
        "model": ["TransformNet"],
        "optimum": ["least_squares"],
        "pipeline": ["GRAY_WEIGHTS", "Pipeline"],
        "runs": ["Run", "open_run", "open_runs"],
        "timing": ["benchmark", "test_inference_time"],
        "training": ["EarlyStopping", "TrainConfig", "load_dataset", "load_model", "train"],
    },
)
