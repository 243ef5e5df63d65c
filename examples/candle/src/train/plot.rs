//! The plot: both loss curves, and peak memory against the length of a sequence.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;

/// What was measured.
pub(crate) struct Measured<'a> {
    /// The loss of each step with our attention and with candle's.
    pub(crate) losses: &'a [(f32, f32)],
    /// Characters of a sequence, and peak bytes of a step with our attention and with candle's.
    pub(crate) peaks: &'a [(usize, usize, usize)],
}

const OURS: RGBColor = RGBColor(0x1f, 0x77, 0xb4);
const CANDLES: RGBColor = RGBColor(0xff, 0x7f, 0x0e);
const FONT: (&str, i32) = ("sans-serif", 14);

/// Writes the plot as SVG.
pub(crate) fn write(path: &Path, measured: &Measured<'_>) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(path, (960, 400)).into_drawing_area();
    root.fill(&WHITE)?;
    let (left, right) = root.split_horizontally(480);
    draw_losses(&left, measured.losses)?;
    draw_peaks(&right, measured.peaks)?;
    root.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn draw_losses(area: &Area<'_>, losses: &[(f32, f32)]) -> Result<(), Box<dyn Error>> {
    let most = losses.iter().map(|&(ours, candles)| ours.max(candles)).fold(0.0, f32::max);
    let mut chart = ChartBuilder::on(area)
        .caption("loss", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(0..losses.len(), 0f32..most * 1.05)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("nats a character")
        .label_style(FONT)
        .light_line_style(WHITE)
        .draw()?;
    // candle's wide and below, so that both are seen where they lie on each other.
    let candles = losses.iter().map(|&(_, candles)| candles).enumerate();
    chart
        .draw_series(LineSeries::new(candles, CANDLES.stroke_width(5)))?
        .label("candle's operations")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], CANDLES.stroke_width(5)));
    let ours = losses.iter().map(|&(ours, _)| ours).enumerate();
    chart
        .draw_series(LineSeries::new(ours, OURS.stroke_width(1)))?
        .label("attention-candle")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], OURS.stroke_width(1)));
    // Losses fall, so that corner is free of them.
    let corner = SeriesLabelPosition::UpperRight;
    chart.configure_series_labels().position(corner).label_font(FONT).border_style(WHITE).draw()?;
    Ok(())
}

fn draw_peaks(area: &Area<'_>, peaks: &[(usize, usize, usize)]) -> Result<(), Box<dyn Error>> {
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    let (Some(&(shortest, least, _)), Some(&(longest, _, most))) = (peaks.first(), peaks.last()) else {
        return Ok(());
    };
    let mut chart = ChartBuilder::on(area)
        .caption("peak memory of a training step", ("sans-serif", 18))
        .margin(12)
        // Half of the last label of the axis.
        .margin_right(24)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d(
            (shortest as f64..longest as f64).log_scale().base(2.0),
            (mib(least) / 2.0..mib(most) * 2.0).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc("characters of a sequence")
        .y_desc("MiB")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .label_style(FONT)
        .light_line_style(WHITE)
        .draw()?;
    let series = |pick: fn(&(usize, usize, usize)) -> usize| {
        peaks.iter().map(move |peak| (peak.0 as f64, mib(pick(peak))))
    };
    for (points, color, width, name) in [
        (series(|peak| peak.2), CANDLES, 3, "candle's operations"),
        (series(|peak| peak.1), OURS, 2, "attention-candle"),
    ] {
        chart
            .draw_series(LineSeries::new(points.clone(), color.stroke_width(width)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(width)));
        chart.draw_series(points.map(|point| Circle::new(point, 3, color.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(FONT)
        .border_style(WHITE)
        .draw()?;
    Ok(())
}
