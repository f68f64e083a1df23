"""From prompt to picture: the pipeline, its loading and saving, image to image, LoRA, prompt cache, offloading."""
