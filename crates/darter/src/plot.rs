//! The drawings of `darter simulate`.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::simulate::Row;

const SIZE: (u32, u32) = (720, 440);

/// Draws, for each number of nodes, how far the last node is over the bound, and what the goal allows.
pub(crate) fn completion(path: &Path, rows: &[Row]) -> Result<()> {
    let point = |row: &Row, percent: f64| (f64::from(row.nodes), percent);
    let measured: Vec<_> = rows.iter().map(|row| point(row, row.overhead())).collect();
    let goal: Vec<_> = rows.iter().map(|row| point(row, row.goal())).collect();
    let texts = ["Last node over the bound", "nodes", "percent over the bound"];
    draw(path, texts, &[Line::new("measured", measured, BLUE), Line::new("goal", goal, RED)])
}

/// What each fixed time costs at one price of a cold start, and what the scaler does.
pub(crate) struct Curve {
    pub(crate) name: String,
    /// Seconds, and the cost over that of 300 s.
    pub(crate) points: Vec<(f64, f64)>,
    pub(crate) ours: f64,
}

/// Draws what replicas cost by how long each is kept: a curve for fixed times, a level for the scaler's own.
pub(crate) fn keep_alive(path: &Path, curves: &[Curve]) -> Result<()> {
    let colors = [BLUE, RED, GREEN, MAGENTA, CYAN, BLACK];
    let mut lines = Vec::new();
    for (curve, color) in curves.iter().zip(colors.into_iter().cycle()) {
        lines.push(Line::new(&format!("fixed, {}", curve.name), curve.points.clone(), color));
        let ends = [curve.points.first(), curve.points.last()].into_iter().flatten();
        let level = ends.map(|(seconds, _)| (*seconds, curve.ours)).collect();
        lines.push(Line::new(&format!("darter, {}", curve.name), level, color));
    }
    draw(path, ["Cost over that of a fixed 300 s", "seconds that a replica without work is kept", "ratio"], &lines)
}

struct Line {
    name: String,
    points: Vec<(f64, f64)>,
    color: RGBColor,
}

impl Line {
    fn new(name: &str, points: Vec<(f64, f64)>, color: RGBColor) -> Self {
        Self { name: name.to_owned(), points, color }
    }
}

fn draw(path: &Path, texts: [&str; 3], lines: &[Line]) -> Result<()> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let top = points().map(|(_, y)| *y).fold(1.0, f64::max) * 1.1;
    let most = points().map(|(x, _)| *x).fold(2.0, f64::max);
    let least = points().map(|(x, _)| *x).fold(most, f64::min).min(most / 2.0);
    drawn(path, texts, (least, most, top), lines).map_err(|error| anyhow!("{error}"))
}

fn drawn(
    path: &Path,
    [caption, x, y]: [&str; 3],
    (least, most, top): (f64, f64, f64),
    lines: &[Line],
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(caption, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d((least..most).log_scale(), 0.0..top)?;
    chart.configure_mesh().x_desc(x).y_desc(y).draw()?;
    for Line { name, points, color } in lines {
        let style = color.stroke_width(2);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style))?
            .label(name.as_str())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, color.filled())))?;
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    area.present()?;
    Ok(())
}
