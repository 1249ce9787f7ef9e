"""Data sheets of GPUs, for floors on a GPU that is not here: what the vendor states, and what is reached of it.

Compute capabilities and shared memory are from the CUDA C++ Programming Guide ("Technical Specifications per Compute
Capability"), everything else from each entry's `source`. Rates are without sparsity, and matrix products accumulate in
float32. No GPU holds what its data sheet states, so each entry also has what somebody measured in large copies and in
PyTorch's matrix products. Where nobody did, the share that an H200 reaches is assumed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from burnish._text import plain

if TYPE_CHECKING:
    from rich.console import RenderableType

_KIB, _MIB, _GIB = 2**10, 2**20, 2**30
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Target:
    """One GPU's data sheet.

    name: "NVIDIA H100 SXM". driver_name: what CUDA calls it. aliases: its names for `find_target`, the first for lists.
    compute_capability: (9, 0). sms: streaming multiprocessors. boost_mhz: their highest clock.
    memory_bytes: the vendor's GB, which are GiB. l2_bytes. shared_bytes: shared memory of one SM.
    memory_gbs: the vendor's peak in GB/s (10^9 bytes), reads and writes together.
    gflops: the vendor's peak GFLOP/s of matrix products, dense, by dtype; "float32" is without TF32, which is "tf32".
    source: the documents with these numbers, and their addresses, divided by "; ".
    measured_gbs, measured_gflops: what was reached, in the same units; measured_by: how, and by whom.
    """

    name: str
    driver_name: str
    aliases: tuple[str, ...]
    compute_capability: tuple[int, int]
    sms: int
    boost_mhz: int
    memory_bytes: int
    l2_bytes: int
    shared_bytes: int
    memory_gbs: float
    gflops: Mapping[str, float]
    source: str
    measured_gbs: float | None
    measured_gflops: Mapping[str, float]
    measured_by: str

    @property
    def label(self) -> str:
        """One line for records and headings."""
        return self.name

    @property
    def architecture(self) -> str:
        """As `DeviceInfo.architecture`: "sm_90"."""
        return "sm_{}{}".format(*self.compute_capability)

    @property
    def attained(self) -> dict[str, float]:
        """The share of the vendor's peak that is reached in practice, of "memory" and of each dtype of `gflops`.

        Measured, or else assumed: memory as on the H200, a dtype as float16 on the same GPU. It can be above 1.0 on
        cards that are clocked higher than the vendor states.
        """
        measured = {dtype: rate / self.gflops[dtype] for dtype, rate in self.measured_gflops.items()}
        memory = _H200_MEMORY_SHARE if self.measured_gbs is None else self.measured_gbs / self.memory_gbs
        return {"memory": memory} | {dtype: measured.get(dtype, measured["float16"]) for dtype in self.gflops}

    def floor_us(
        self, flops: float, num_bytes: float, dtype: torch.dtype = torch.float32, *, attained: bool = True
    ) -> float:
        """The least time in microseconds that this GPU needs to move `num_bytes` and to compute `flops`.

        As `DeviceInfo.floor_us`, the larger of the two, at the rates that are reached; `attained=False` takes the
        vendor's peaks. A dtype that the matrix units do not know counts as what it is converted to: fp8 as float16,
        every other one as float32.
        """
        key = "fp8" if dtype in _FP8 else str(dtype).removeprefix("torch.")
        if key not in self.gflops:
            key = "float16" if key == "fp8" else "float32"
        shares = self.attained if attained else {"memory": 1.0, key: 1.0}
        memory_us = num_bytes / (self.memory_gbs * shares["memory"]) / 1e3
        return max(flops / (self.gflops[key] * shares[key]) / 1e3, memory_us)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for JSON."""
        return {**asdict(self), "architecture": self.architecture, "attained": self.attained}

    def __rich__(self) -> RenderableType:
        from burnish.hardware.show import target_view

        return target_view(self)

    def __str__(self) -> str:
        return plain(self)


def find_target(name: str) -> Target:
    """The data sheet of that name: "h200", "NVIDIA H200", "rtx4090", "RTX 4090", "4090"; case does not matter.

    ValueError that lists all for an unknown name.
    """
    wanted = _spelling(name)
    for target in TARGETS:
        if wanted in map(_spelling, (target.name, target.driver_name, *target.aliases)):
            return target
    raise ValueError(f"there is no target {name!r}; there are: {', '.join(target.aliases[0] for target in TARGETS)}")


def target_of(driver_name: str) -> Target | None:
    """The data sheet of the GPU that CUDA calls so; None where there is none."""
    return next((target for target in TARGETS if target.driver_name == driver_name), None)


def _spelling(name: str) -> str:
    """Letters and digits, without the words that every name of a family has."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


_H200_MEMORY_SHARE = 4_240 / 4_800

_AMPERE = (
    "NVIDIA A100 Tensor Core GPU Architecture (white paper), "
    "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf; "
    "NVIDIA A100 datasheet, https://www.nvidia.com/en-us/data-center/a100/"
)
_HOPPER = (
    "NVIDIA H100 product page, https://www.nvidia.com/en-us/data-center/h100/; "
    "NVIDIA H100 Tensor Core GPU Architecture (white paper), "
    "https://resources.nvidia.com/en-us-hopper-architecture/nvidia-h100-tensor-c"
)
_ADA = (
    "NVIDIA Ada GPU Architecture (white paper), "
    "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
)
# One script on all of them: torch.matmul of 1024x1024 to 10240x10240, the best size. On an H200 it gives 51, 759 and
# 790 TFLOP/s in float32, float16 and bfloat16, within 2% of burnish.device().
_MATMUL = "matrix products: https://github.com/zzc0721/torch-performance-test-data"
_COPY = "copy: https://github.com/xytpai/nvbench"

TARGETS = (
    Target(
        name="NVIDIA A100 40GB SXM",
        driver_name="NVIDIA A100-SXM4-40GB",
        aliases=("a100-40gb",),
        compute_capability=(8, 0),
        sms=108,
        boost_mhz=1_410,
        memory_bytes=40 * _GIB,
        l2_bytes=40 * _MIB,
        shared_bytes=164 * _KIB,
        memory_gbs=1_555,
        gflops={"float32": 19_500, "tf32": 156_000, "float16": 312_000, "bfloat16": 312_000},
        source=_AMPERE,
        measured_gbs=1_379,
        measured_gflops={"float32": 19_180, "float16": 258_740, "bfloat16": 264_530},
        measured_by=f"{_MATMUL} (on the 80 GB, the same chip); {_COPY}",
    ),
    Target(
        name="NVIDIA A100 80GB SXM",
        driver_name="NVIDIA A100-SXM4-80GB",
        aliases=("a100-80gb", "a100"),
        compute_capability=(8, 0),
        sms=108,
        boost_mhz=1_410,
        memory_bytes=80 * _GIB,
        l2_bytes=40 * _MIB,
        shared_bytes=164 * _KIB,
        memory_gbs=2_039,
        gflops={"float32": 19_500, "tf32": 156_000, "float16": 312_000, "bfloat16": 312_000},
        source=_AMPERE,
        measured_gbs=None,
        measured_gflops={"float32": 19_180, "float16": 258_740, "bfloat16": 264_530},
        measured_by=_MATMUL,
    ),
    Target(
        name="NVIDIA H100 SXM",
        driver_name="NVIDIA H100 80GB HBM3",
        aliases=("h100-sxm", "h100"),
        compute_capability=(9, 0),
        sms=132,
        boost_mhz=1_980,  # of the tensor cores 1,830: their peaks are stated for that
        memory_bytes=80 * _GIB,
        l2_bytes=50 * _MIB,
        shared_bytes=228 * _KIB,
        memory_gbs=3_350,
        gflops={"float32": 66_900, "tf32": 494_700, "float16": 989_400, "bfloat16": 989_400, "fp8": 1_978_900},
        source=_HOPPER,
        measured_gbs=None,
        measured_gflops={"float32": 51_880, "tf32": 402_150, "float16": 760_040, "bfloat16": 797_510},
        measured_by=_MATMUL,
    ),
    Target(
        name="NVIDIA H100 PCIe",
        driver_name="NVIDIA H100 PCIe",
        aliases=("h100-pcie",),
        compute_capability=(9, 0),
        sms=114,
        boost_mhz=1_755,
        memory_bytes=80 * _GIB,
        l2_bytes=50 * _MIB,
        shared_bytes=228 * _KIB,
        memory_gbs=2_000,
        gflops={"float32": 51_200, "tf32": 378_000, "float16": 756_000, "bfloat16": 756_000, "fp8": 1_513_000},
        source=_HOPPER,
        measured_gbs=None,
        measured_gflops={"float32": 36_950, "tf32": 240_430, "float16": 458_030, "bfloat16": 495_930},
        measured_by=_MATMUL,
    ),
    Target(
        name="NVIDIA H200",
        driver_name="NVIDIA H200",
        aliases=("h200",),
        compute_capability=(9, 0),
        sms=132,
        boost_mhz=1_980,  # as the H100
        memory_bytes=141 * _GIB,
        l2_bytes=60 * _MIB,  # as the driver reports it: more of the chip's cache is on than in the H100
        shared_bytes=228 * _KIB,
        memory_gbs=4_800,
        gflops={"float32": 66_900, "tf32": 494_700, "float16": 989_400, "bfloat16": 989_400, "fp8": 1_978_900},
        source=f"NVIDIA H200 product page, https://www.nvidia.com/en-us/data-center/h200/; {_HOPPER} (the same chip)",
        measured_gbs=4_240,
        measured_gflops={"float32": 51_000, "float16": 744_000, "bfloat16": 774_000},
        measured_by="burnish.device(), torch 2.11, CUDA 13.0: a copy of 1 GiB, products of 8192x8192",
    ),
    Target(
        name="NVIDIA B200",
        driver_name="NVIDIA B200",
        aliases=("b200",),
        compute_capability=(10, 0),
        sms=148,
        boost_mhz=1_965,  # as the driver reports it
        memory_bytes=180 * _GIB,
        l2_bytes=126 * _MIB,
        shared_bytes=228 * _KIB,
        memory_gbs=7_700,
        gflops={"float32": 75_000, "tf32": 1_100_000, "float16": 2_250_000, "bfloat16": 2_250_000, "fp8": 4_500_000},
        source="NVIDIA Blackwell datasheet (HGX B200), "
        "https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703; "
        "NVIDIA Blackwell Tuning Guide, https://docs.nvidia.com/cuda/blackwell-tuning-guide/",
        measured_gbs=None,
        measured_gflops={"float32": 66_240, "float16": 1_627_640, "bfloat16": 1_696_030},
        measured_by=_MATMUL,
    ),
    Target(
        name="NVIDIA L4",
        driver_name="NVIDIA L4",
        aliases=("l4",),
        compute_capability=(8, 9),
        sms=58,
        boost_mhz=2_040,
        memory_bytes=24 * _GIB,
        l2_bytes=48 * _MIB,
        shared_bytes=100 * _KIB,
        memory_gbs=300,
        gflops={"float32": 30_300, "tf32": 60_000, "float16": 121_000, "bfloat16": 121_000, "fp8": 242_500},
        source=f"{_ADA}; NVIDIA L4 product page, https://www.nvidia.com/en-us/data-center/l4/",
        measured_gbs=None,
        # 72 W do not carry its clock: a product of 8192x8192, which takes longer, reached only 53.8 in float16.
        measured_gflops={"float32": 15_380, "tf32": 31_880, "float16": 68_830, "bfloat16": 70_890},
        measured_by=_MATMUL,
    ),
    Target(
        name="NVIDIA RTX 4090",
        driver_name="NVIDIA GeForce RTX 4090",
        aliases=("rtx4090", "4090"),
        compute_capability=(8, 9),
        sms=128,
        boost_mhz=2_520,
        memory_bytes=24 * _GIB,
        l2_bytes=72 * _MIB,
        shared_bytes=100 * _KIB,
        memory_gbs=1_008,
        gflops={"float32": 82_600, "tf32": 82_600, "float16": 165_200, "bfloat16": 165_200, "fp8": 330_300},
        source=_ADA,
        measured_gbs=921,
        measured_gflops={"float32": 55_010, "tf32": 85_650, "float16": 165_080, "bfloat16": 170_060},
        measured_by=f"{_MATMUL}; {_COPY}",
    ),
    Target(
        name="NVIDIA T4",
        driver_name="Tesla T4",
        aliases=("t4",),
        compute_capability=(7, 5),
        sms=40,
        boost_mhz=1_590,
        memory_bytes=16 * _GIB,
        l2_bytes=4 * _MIB,
        shared_bytes=64 * _KIB,
        memory_gbs=320,  # 256 bits at 5,001 MHz; the datasheet rounds to 300
        gflops={"float32": 8_100, "float16": 65_000},
        source="NVIDIA T4 datasheet, "
        "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf; "
        f"{_ADA}",
        measured_gbs=240,
        measured_gflops={"float32": 4_430, "float16": 42_710},
        measured_by=f"{_MATMUL}; copy: CUDA's bandwidthTest, https://github.com/router-gao/cuda-demo",
    ),
)
"""Every data sheet there is."""
