"""Turn prompts into pictures: the pipeline, its loading and saving, image to image, LoRA, prompt cache, offloading."""
