from config.proxy import *

dataset = 'out/lessons/3_tune_small_verify_train_once-full/python_topics.txt'
tokenizer = "bpe:512"  # 512 tokens, learned from the text by byte-pair encoding
width, depth = 128, 2
base_width, base_depth = 32, 2
head_dim = base_head_dim = 16  # channels of an attention head
batch = base_batch = 8  # sequences
context = 64  # tokens
steps = 250
eval_tokens = 32768
