"""Burnish against eager PyTorch, torch.compile and ONNX Runtime: one file per group, one runner, results as JSON.

python -m benchmarks cpu-models --case 'minilm fp32*'
python -m benchmarks.tables
"""
