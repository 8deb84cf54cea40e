"""Other libraries: transformers, torchvision, ONNX, checkpoints of others."""
