"""The CIFAR networks under comparison, their widths and sizes."""
