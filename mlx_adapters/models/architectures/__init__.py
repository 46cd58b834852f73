"""One row per architecture: everything that is known of a `model_type`, and the only place that names one."""
