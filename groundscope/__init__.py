"""groundscope: where a vision-language model knows what it sees, what uses it, why an answer is wrong, what corrects it."""
