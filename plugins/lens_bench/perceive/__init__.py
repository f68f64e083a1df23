"""Stage 2 of a benchmark: models look at pictures, and what they see is stored as plain data.

run          asks perceivers about pictures: canaries, batches, one model at a time
kept         perceivers that stay in memory between calls of `score`
cache        answers on disk, by picture, model, revision, version and question
canary       pictures of known content, on which a perceiver proves itself before it is believed
pictures     picture files to RGB, with what a benchmark does to them first
weights      models of the transformers library, from a folder or the Hub
detection    Mask2Former's preprocessing and decoding as mmdet has them: pure functions
masks        masks as text
mask2former  perceiver `mask2former`: objects of COCO's 80 classes
clip         CLIP's preprocessing and embeddings; perceivers `clip_colors` and `clip_similarity`
rapid_ocr    perceivers `rapidocr` and `paddle_ocr`: lines of text
vlm          perceiver `vlm`: any `llm` that takes pictures
style        perceiver `clip_style`: similarity to the reference pictures of a style
csd          CSD's weights, converted for `clip_style`
dreamsim     perceiver `dreamsim`: embeddings whose cosine distance is DreamSim's
recall       how much an OCR perceiver reads of sentences drawn with real fonts: a table

What a perceiver is asked and what it answers, by `perceives`. None: there is nothing to ask.

objects            None -> {class: [{"box": [x1, y1, x2, y2], "score", "mask"}]}, ends exclusive; `masks` decodes a mask
colors             {"class", "objects": [{"box", "mask"}]} -> the colour of each object
lines              None -> the lines of text
answer             a prompt, or {"text": prompt, "max_tokens": n} -> text
similarity         text -> the cosine of picture and text
embedding          None -> a vector of length 1
style similarity   a style -> the largest cosine to its reference pictures
answer similarity  the text of an answer -> a cosine (OneIG's reasoning; no perceiver of Lens offers it)
"""
