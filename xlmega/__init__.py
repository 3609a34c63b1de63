"""xlmega: a trainer for multilingual language models on Megatron-core and DeepSpeed."""

__version__ = "0.1.0"
