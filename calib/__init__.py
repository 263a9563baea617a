"""Calibration, ranges and Q/DQ placement for INT8. Packages are FP32 so far, so nothing is calibrated yet."""
