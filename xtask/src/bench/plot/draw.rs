//! Charts: bars in groups, ratios by row, and lines. White below everything, so that dark pages do not show
//! through.

use std::error::Error;

use plotters::chart::MeshStyle;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

pub(super) type Drawn<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;
pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const GRID: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);
/// Heights of what stands above and below the charts: title and legend, a line of notes.
const TOP: i32 = 62;
const LINE: i32 = 18;
/// The size of what is written on axes: pages show a figure at three quarters of its width.
const SMALL: i32 = 13;

/// Ours are blue, other libraries orange; within both, lightness tells them apart without colour.
pub(super) const OURS: [RGBColor; 2] = [RGBColor(0x12, 0x4f, 0x8c), RGBColor(0x6a, 0xaf, 0xe6)];
pub(super) const THEIRS: [RGBColor; 3] =
    [RGBColor(0xb3, 0x4a, 0x00), RGBColor(0xf5, 0x8d, 0x2c), RGBColor(0xfc, 0xce, 0x9a)];
pub(super) const NEITHER: RGBColor = RGBColor(0x80, 0x80, 0x80);

/// A name in the legend, with its colour.
pub(super) type Series<'a> = (&'a str, RGBColor);

fn text(size: i32, horizontal: HPos, vertical: VPos) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&INK).pos(Pos::new(horizontal, vertical))
}

/// A figure: title, legend, what `charts` draws, and below it what must be known and where the numbers are
/// from.
pub(super) fn figure(
    (width, height): (u32, u32),
    title: &str,
    series: &[Series<'_>],
    notes: &[String],
    charts: impl FnOnce(&Area<'_>) -> Drawn,
) -> Drawn<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
        root.fill(&WHITE)?;
        root.draw(&Text::new(title.to_owned(), (14, 10), text(18, HPos::Left, VPos::Top)))?;
        let mut x = 14;
        for &(name, color) in series {
            root.draw(&Rectangle::new([(x, 38), (x + 12, 50)], color.filled()))?;
            root.draw(&Text::new(name.to_owned(), (x + 18, 44), text(14, HPos::Left, VPos::Center)))?;
            // Characters are about half as wide as high.
            x += 48 + 7 * i32::try_from(name.len())?;
        }
        let (top, bottom) = (TOP, height as i32 - LINE * notes.len() as i32 - 8);
        let (_, rest) = root.split_vertically(top);
        let (middle, _) = rest.split_vertically(bottom - top);
        charts(&middle)?;
        for (index, note) in notes.iter().enumerate() {
            let at = (14, bottom + LINE * index as i32);
            root.draw(&Text::new(note.clone(), at, text(SMALL, HPos::Left, VPos::Top)))?;
        }
        root.present()?;
    }
    Ok(svg)
}

/// A grid and axes as every figure has them.
fn styled<'m, 'a, 'b, X: Ranged, Y: Ranged, DB: DrawingBackend>(
    mesh: &'m mut MeshStyle<'a, 'b, X, Y, DB>,
) -> &'m mut MeshStyle<'a, 'b, X, Y, DB> {
    mesh.label_style(("sans-serif", SMALL)).bold_line_style(GRID).light_line_style(WHITE).axis_style(INK)
}

/// Bars in groups.
pub(super) struct Bars<'a> {
    pub(super) title: &'a str,
    pub(super) unit: &'a str,
    /// What is written below each group, in two lines.
    pub(super) groups: Vec<[String; 2]>,
    /// For each group the bar of each series, if there is one.
    pub(super) values: Vec<Vec<Option<f64>>>,
    /// Where the axis ends.
    pub(super) most: f64,
}

/// Draws bars, all series in their colours.
pub(super) fn bars(area: &Area<'_>, series: &[Series<'_>], bars: &Bars<'_>) -> Drawn {
    let mut chart = ChartBuilder::on(area)
        .caption(bars.title, ("sans-serif", 16))
        .margin(8)
        .x_label_area_size(38)
        .y_label_area_size(48)
        .build_cartesian_2d(0f64..bars.groups.len() as f64, 0f64..bars.most)?;
    let mut mesh = chart.configure_mesh();
    mesh.disable_x_mesh().x_labels(0).y_desc(bars.unit).y_label_formatter(&|value| format!("{value}"));
    styled(&mut mesh).draw()?;
    let below = |line: i32, group: usize| {
        let (x, y) = chart.backend_coord(&(group as f64 + 0.5, 0.0));
        let (left, top) = area.get_base_pixel();
        (x - left, y - top + 5 + 15 * line)
    };
    for (group, labels) in bars.groups.iter().enumerate() {
        for (line, label) in (0..).zip(labels) {
            let style = text(SMALL, HPos::Center, VPos::Top);
            area.draw(&Text::new(label.clone(), below(line, group), style))?;
        }
    }
    // A fifth of a group is left free.
    let width = 0.8 / series.len() as f64;
    for (index, &(_, color)) in series.iter().enumerate() {
        chart.draw_series(bars.values.iter().enumerate().filter_map(|(group, values)| {
            let left = group as f64 + 0.1 + width * index as f64;
            let value = values[index]?;
            Some(Rectangle::new([(left, 0.0), (left + width * 0.92, value)], color.filled()))
        }))?;
    }
    Ok(())
}

/// Ratios, a row each.
pub(super) struct Ratios<'a> {
    pub(super) title: &'a str,
    pub(super) unit: &'a str,
    /// What is written before each row, and the point of each series, if there is one.
    pub(super) rows: Vec<(String, Vec<Option<f64>>)>,
    pub(super) range: (f64, f64),
    /// Pixels before the axis.
    pub(super) labels: u32,
}

/// Draws ratios on a logarithmic axis, from a line at 1.
pub(super) fn ratios(area: &Area<'_>, series: &[Series<'_>], ratios: &Ratios<'_>) -> Drawn {
    let rows = ratios.rows.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(ratios.title, ("sans-serif", 16))
        .margin(8)
        .margin_right(18)
        .x_label_area_size(38)
        .y_label_area_size(ratios.labels)
        .build_cartesian_2d((ratios.range.0..ratios.range.1).log_scale().base(2.0), 0f64..rows)?;
    let mut mesh = chart.configure_mesh();
    mesh.disable_y_mesh().y_labels(0).x_desc(ratios.unit).x_label_formatter(&|value| format!("{value}"));
    styled(&mut mesh).draw()?;
    chart.draw_series([PathElement::new([(1.0, 0.0), (1.0, rows)], INK.stroke_width(2))])?;
    let place = |index: usize| rows - index as f64 - 0.5;
    for (index, (label, _)) in ratios.rows.iter().enumerate() {
        let (x, y) = chart.backend_coord(&(ratios.range.0, place(index)));
        let (left, top) = area.get_base_pixel();
        let style = text(SMALL, HPos::Right, VPos::Center);
        area.draw(&Text::new(label.clone(), (x - left - 6, y - top), style))?;
    }
    for (column, &(_, color)) in series.iter().enumerate() {
        for (index, (_, values)) in ratios.rows.iter().enumerate() {
            let Some(value) = values[column] else { continue };
            let ends = [(1.0, place(index)), (value, place(index))];
            chart.draw_series([PathElement::new(ends, color.mix(0.4).stroke_width(2))])?;
            chart.draw_series([Circle::new((value, place(index)), 4, color.filled())])?;
        }
    }
    Ok(())
}

/// A line, with a point at each measurement; dashed where nothing was measured.
pub(super) struct Line {
    pub(super) points: Vec<(f64, f64)>,
    pub(super) color: RGBColor,
    pub(super) measured: bool,
    /// What is written behind its last point, where it ends before the axis does.
    pub(super) end: Option<String>,
}

/// Draws lines on logarithmic axes.
pub(super) fn lines(
    area: &Area<'_>,
    title: &str,
    (x_unit, y_unit): (&str, &str),
    ((x0, x1), (y0, y1)): ((f64, f64), (f64, f64)),
    lines: &[Line],
) -> Drawn {
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(8)
        .margin_right(18)
        .x_label_area_size(38)
        .y_label_area_size(60)
        .build_cartesian_2d((x0..x1).log_scale().base(2.0), (y0..y1).log_scale().base(2.0))?;
    let mut mesh = chart.configure_mesh();
    mesh.x_desc(x_unit)
        .y_desc(y_unit)
        .x_label_formatter(&|value| format!("{value}"))
        .y_label_formatter(&|value| format!("{value}"));
    styled(&mut mesh).draw()?;
    for line in lines {
        let points = line.points.iter().copied();
        if line.measured {
            chart.draw_series(LineSeries::new(points.clone(), line.color.stroke_width(2)))?;
            chart.draw_series(points.map(|point| Circle::new(point, 4, line.color.filled())))?;
        } else {
            chart.draw_series(DashedLineSeries::new(points, 6, 4, line.color.stroke_width(2)))?;
        }
        if let (Some(end), Some(last)) = (&line.end, line.points.last()) {
            let ((x, y), (left, top)) = (chart.backend_coord(last), area.get_base_pixel());
            let style = text(SMALL, HPos::Left, VPos::Center);
            area.draw(&Text::new(end.clone(), (x - left + 10, y - top), style))?;
        }
    }
    Ok(())
}
