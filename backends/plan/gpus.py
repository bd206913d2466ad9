"""The GPUs that the plan knows: what they hold, how fast they read it, and which formats they compute in.

Two figures of memory: `nominal_gb`, the data sheet's, and `driver_mib`, what the driver reports and an engine can
count on. They disagree, mostly because one counts in 10^9 and the other in 2^20 bytes: "H100 80 GB" is 81,559 MiB,
85.5 x 10^9 bytes; "B200" is 180 GB in some of NVIDIA's documents and 192 GB in others, and 183,359 MiB are both,
179 GiB and 192 x 10^9 bytes. The sums use the driver's figure.
"""

from __future__ import annotations

from dataclasses import dataclass

from backends.plan.errors import PlanError
from backends.plan.units import MIB, TB

NATIVE = "native"
WEIGHTS = "weights"
NO = "no"
"""How a GPU takes a format: it computes in it; it keeps weights in it and computes in 16 bits; not at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of GPU, and the usual machine around it."""

    name: str
    title: str
    nominal_gb: float
    driver_mib: int
    bandwidth: float  # bytes/s of its memory
    fp8: str = NATIVE
    int4: str = WEIGHTS
    mxfp4: str = WEIGHTS
    nvfp4: str = WEIGHTS
    link: str | None  # what joins the GPUs of a machine, None: PCIe alone
    per_node: int = 8
    engines: tuple[str, ...] = ("sglang", "vllm", "trtllm", "lmdeploy")
    vendor: str = "nvidia"
    sources: tuple[str, ...]
    notes: tuple[str, ...] = ()
    fp8_note: str | None = None

    @property
    def memory_bytes(self) -> int:
        """As the driver reports it."""
        return self.driver_mib * MIB


_NVIDIA_SMI = "https://github.com/modal-labs/modal-client/pull/2797 (nvidia-smi of each: total MiB)"
_B200_SHEET = "https://resources.nvidia.com/en-us-dgx-systems/dgx-b200-datasheet"

GPUS = (
    Gpu(
        name="h100",
        title="H100 SXM 80 GB",
        nominal_gb=80,
        driver_mib=81_559,
        bandwidth=3.35 * TB,
        link="NVLink 4, 900 GB/s",
        sources=("https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet", _NVIDIA_SMI),
    ),
    Gpu(
        name="h200",
        title="H200 SXM 141 GB",
        nominal_gb=141,
        driver_mib=143_771,
        bandwidth=4.8 * TB,
        link="NVLink 4, 900 GB/s",
        sources=(
            "https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446",
            "https://github.com/sgl-project/sglang/issues/3196 (nvidia-smi: 143771 MiB)",
        ),
    ),
    Gpu(
        name="b200",
        title="B200 SXM 180 GB",
        nominal_gb=180,
        driver_mib=183_359,
        bandwidth=8.0 * TB,
        mxfp4=NATIVE,
        nvfp4=NATIVE,
        link="NVLink 5, 1.8 TB/s",
        sources=(
            f"{_B200_SHEET} (8 GPUs: 1,440 GB, 64 TB/s)",
            "https://github.com/NVIDIA/TensorRT-LLM/issues/10278 (nvidia-smi: 183359 MiB)",
        ),
        notes=(
            "180 GB in the DGX data sheet, 192 GB elsewhere: the driver's 183,359 MiB are 179 GiB and 192 x 10^9 B",
        ),
    ),
    Gpu(
        name="b300",
        title="B300 SXM 288 GB",
        nominal_gb=288,
        driver_mib=275_040,
        bandwidth=8.0 * TB,
        mxfp4=NATIVE,
        nvfp4=NATIVE,
        link="NVLink 5, 1.8 TB/s",
        sources=(
            "https://developer.nvidia.com/blog/inside-nvidia-blackwell-ultra-the-chip-powering-the-ai-factory-era/",
            "https://www.nvidia.com/en-us/data-center/dgx-b300/ (8 GPUs: 2.1 TB, which is 268 GiB each)",
            "nvidia-smi of a B300 SXM6 AC: 275040 MiB",
        ),
        notes=("288 GB are 268.6 GiB, which is where figures of 268 and 270 come from",),
    ),
    Gpu(
        name="mi300x",
        title="MI300X 192 GB",
        nominal_gb=192,
        driver_mib=196_592,
        bandwidth=5.3 * TB,
        nvfp4=NO,
        link="Infinity Fabric, 896 GB/s",
        engines=("sglang", "vllm"),
        vendor="amd",
        sources=(
            "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf",
            "https://github.com/ROCm/legacy-rocm-build/issues/4750 (rocm-smi: 206141652992 B = 196592 MiB)",
        ),
        fp8_note="FP8 is AMD's e4m3fnuz: engines convert the weights of NVIDIA's e4m3 while loading",
    ),
    Gpu(
        name="gaudi2",
        title="Gaudi 2 96 GB",
        nominal_gb=96,
        driver_mib=98_304,
        bandwidth=2.45 * TB,
        int4=NO,
        mxfp4=NO,
        nvfp4=NO,
        link="24 x 100 GbE on the chip",
        engines=("vllm",),
        vendor="intel",
        sources=(
            "https://docs.habana.ai/en/latest/Gaudi_Overview/Gaudi_Architecture.html (96 GB, 2.45 TB/s)",
            "https://docs.vllm.ai/projects/gaudi/en/latest/ (the plugin that vLLM needs)",
        ),
        notes=(
            "served by vLLM with the plugin vllm-gaudi; SGLang runs there only as Intel's fork "
            "(https://docs.habana.ai/en/latest/PyTorch/SGLang_Inference/SGLang_FAQs.html)",
        ),
        fp8_note="its FP8 has a range of +-240, so checkpoints of e4m3 are rescaled by the plugin",
    ),
    Gpu(
        name="a100",
        title="A100 SXM 80 GB",
        nominal_gb=80,
        driver_mib=81_920,
        bandwidth=2.039 * TB,
        fp8=WEIGHTS,
        nvfp4=NO,
        link="NVLink 3, 600 GB/s",
        sources=(
            "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
            _NVIDIA_SMI,
        ),
        fp8_note="no FP8 tensor cores: FP8 weights are kept as they are and computed in 16 bits (W8A16, Marlin)",
    ),
    Gpu(
        name="a100-40gb",
        title="A100 SXM 40 GB",
        nominal_gb=40,
        driver_mib=40_960,
        bandwidth=1.555 * TB,
        fp8=WEIGHTS,
        nvfp4=NO,
        link="NVLink 3, 600 GB/s",
        sources=(
            "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet.pdf",
            _NVIDIA_SMI,
        ),
        fp8_note="no FP8 tensor cores: FP8 weights are kept as they are and computed in 16 bits (W8A16, Marlin)",
    ),
    Gpu(
        name="l40s",
        title="L40S 48 GB",
        nominal_gb=48,
        driver_mib=46_068,
        bandwidth=0.864 * TB,
        link=None,
        sources=("https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413", _NVIDIA_SMI),
        notes=("no NVLink: what the GPUs of a replica tell each other goes over PCIe",),
    ),
    Gpu(
        name="rtx4090",
        title="RTX 4090 24 GB",
        nominal_gb=24,
        driver_mib=24_564,
        bandwidth=1.008 * TB,
        link=None,
        sources=(
            "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf (appendix A)",
            "https://github.com/vllm-project/vllm/issues/7553 (nvidia-smi: 24564 MiB)",
        ),
        notes=("no NVLink, and GeForce drivers have no peer-to-peer: what GPUs tell each other goes through the host",),
    ),
)

_ALIASES = {
    "h100-sxm": "h100",
    "h200-sxm": "h200",
    "gaudi-2": "gaudi2",
    "hl-225": "gaudi2",
    "a100-80gb": "a100",
    "a100-40": "a100-40gb",
    "a100-80": "a100",
    "4090": "rtx4090",
    "rtx-4090": "rtx4090",
}


def gpu_named(name: str) -> Gpu:
    """The GPU of that name. Raises `PlanError` with the names there are."""
    plain = name.strip().lower().replace(" ", "-").replace("_", "-")
    plain = _ALIASES.get(plain, plain)
    for gpu in GPUS:
        if gpu.name == plain:
            return gpu
    raise PlanError(f"gpu: {name!r} is not known; known are {', '.join(gpu.name for gpu in GPUS)}")


def format_of(gpu: Gpu, precision: str) -> str:
    """How the GPU takes weights of a precision: `native`, `weights` (kept so, computed in 16 bits) or `no`."""
    match precision:
        case "fp8":
            return gpu.fp8
        case "int4":
            return gpu.int4
        case "mxfp4":
            return gpu.mxfp4
        case "nvfp4":
            return gpu.nvfp4
        case _:
            return NATIVE
