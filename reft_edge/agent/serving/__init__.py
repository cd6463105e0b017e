"""Which model a device serves, how it comes to serve another, and predicting with it.

The daemon's part loads neither numpy nor onnxruntime: `slots`, the deployment session and its words. What measures and
predicts is for the worker and for processes that predict.
"""
