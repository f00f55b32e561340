"""A checkpoint of Hugging Face as a GGUF file.

Start with open_checkpoint.py. stored/ reads files, quantized/ and vocabulary/ translate, back/ writes a checkpoint.
"""
