"""Programs for tokopt's own CPU kernels: a form beside each that ONNX Runtime's CPU kernels run."""
