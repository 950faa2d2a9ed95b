"""The same network without spikes, and the firing rate at which both would cost the same."""

from dataclasses import dataclass

from .constants import FP32_MAC, mac
from .facts import Facts, Kind
from .pricing import Bill


@dataclass(frozen=True)
class AnnTwin:
    """The network run once (T = 1) with dense products, and what the spiking network must stay below."""

    macs: float  # per sample, zero padding included, biases excluded
    fp32_mj: float
    int8_mj: float
    mean_rate: float | None  # of the spiking inputs, weighted by the products they meet; None without rates
    break_even_fp32: float | None  # mean rate at which the spiking network costs as much; None: at no rate
    break_even_int8: float | None


def ann_twin(facts: Facts, bill: Bill) -> AnnTwin:
    """Dense products at T = 1 in FP32 (4.6 pJ) and INT8 (0.23 pJ), against `bill`.

    The break-even rate scales what depends on spikes in proportion to the mean rate and keeps the rest (first
    convolution, head, neurons, biases, residuals, pools, memory of fixed size). It may exceed 1: then the spiking
    network is cheaper at every rate.
    """
    macs = sum(facts.per_sample(p, p.dense, unrolled=True) / facts.steps_of(p) for p in facts.products)
    fp32, int8 = macs * FP32_MAC / 1e9, macs * mac("int8") / 1e9
    spiking = [p for p in facts.products if p.weighted and p.kind < Kind.ANALOG]
    valid = sum(facts.per_sample(p, p.valid) for p in spiking)
    events = sum(facts.per_sample(p, p.events) for p in spiking)
    if not valid or not events:
        return AnnTwin(macs, fp32, int8, None, None, None)
    mean = events / valid
    names = {p.name for p in facts.products if p.kind < Kind.ANALOG} | {a.name for a in facts.attentions}
    moving = sum(line.energy_pj for line in bill.lines
                 if line.component in ("synapses", "attention") and line.name in names) / 1e9  # fmt: skip
    fixed = bill.energy_mj - moving

    def rate(target: float) -> float | None:
        return mean * (target - fixed) / moving if moving and target > fixed else None

    return AnnTwin(macs, fp32, int8, mean, rate(fp32), rate(int8))
