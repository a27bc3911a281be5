"""Program that prints the UUID of every GPU in CUDA's order, one a line; it needs the standard library only.

CUDA's order differs from NVML's: ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER`` change it, and a MIG slice is a
device. Only the driver knows the order. ``cuInit`` would break a later ``fork`` of the calling process, so this is a
separate program. It creates no context and takes no GPU memory.
Source: CUDA driver API, device management (``cuDeviceGetUuid_v2`` gives a MIG slice its own UUID).
"""

import ctypes
import sys
import uuid


def main() -> int:
    """Print the UUIDs; return the driver's error code, 0 for none."""
    cuda = ctypes.CDLL("libcuda.so.1")
    count = ctypes.c_int()
    if status := cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return int(status)
    for ordinal in range(count.value):
        handle, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
        if status := cuda.cuDeviceGet(ctypes.byref(handle), ordinal) or cuda.cuDeviceGetUuid_v2(raw, handle):
            return int(status)
        sys.stdout.write(f"{uuid.UUID(bytes=bytes(raw))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
