"""The field's usual frontier: speed for one user against throughput of a device, over the batch."""

from collections.abc import Sequence

from tokenworks.cost import Batch, Prepared


def batches(prepared: Prepared, context_tokens: int) -> list[int]:
    """1, 2, 4 and so on, to the largest batch whose contexts fit."""
    most = max(prepared.kv_capacity_tokens // (context_tokens + 1), 0)
    sizes = [1 << power for power in range(20) if 1 << power <= most]
    return [*sizes, most] if sizes and sizes[-1] != most else sizes


def page(curves: Sequence[tuple[str, Prepared, int]], context_tokens: int, title: str) -> str:
    """One HTML page with a curve for each (name, placement, devices)."""
    # Takes longer to import than everything else together: only who draws pays for it.
    import plotly.graph_objects as go  # noqa: PLC0415

    figure = go.Figure()
    for name, prepared, devices in curves:
        sizes = batches(prepared, context_tokens)
        costs = [prepared.step(Batch.of(size, context_tokens)) for size in sizes]
        per_step = prepared.tokens_per_step
        figure.add_scatter(
            x=[per_step * 1e12 / cost.time_ps for cost in costs],
            y=[
                per_step * size * 1e12 / cost.time_ps / devices
                for size, cost in zip(sizes, costs, strict=True)
            ],
            customdata=[
                (size, cost.energy_j / size / per_step, cost.bound)
                for size, cost in zip(sizes, costs, strict=True)
            ],
            mode="lines+markers",
            name=name,
            hovertemplate="batch %{customdata[0]}<br>%{x:.4g} tokens/s/user<br>"
            "%{y:.4g} tokens/s/device<br>%{customdata[1]:.3g} J/token<br>"
            "bound: %{customdata[2]}<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(
        title=title,
        xaxis_title="tokens/s for each user",
        yaxis_title="tokens/s per device",
        xaxis_type="log",
        yaxis_type="log",
        template="plotly_white",
        legend_orientation="h",
    )
    page: str = figure.to_html(include_plotlyjs=True, full_html=True)
    return page
