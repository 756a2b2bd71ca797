"""minigpt: a GPT-2 that fits in a reader's head, and the int4 quantizers that shrink it."""
