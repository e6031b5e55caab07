//! The drawing of `darter simulate`: the last node's time over the number of nodes.

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
    let top = measured.iter().chain(&goal).map(|(_, percent)| *percent).fold(1.0, f64::max) * 1.1;
    let most = measured.iter().map(|(nodes, _)| *nodes).fold(2.0, f64::max);
    let least = measured.iter().map(|(nodes, _)| *nodes).fold(most, f64::min).min(most / 2.0);
    draw(path, (least, most, top), &[("measured", measured, BLUE), ("goal", goal, RED)])
        .map_err(|error| anyhow!("{error}"))
}

type Line<'a> = (&'a str, Vec<(f64, f64)>, RGBColor);

fn draw(
    path: &Path,
    (least, most, top): (f64, f64, f64),
    lines: &[Line<'_>],
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption("Last node over the bound", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d((least..most).log_scale(), 0.0..top)?;
    chart.configure_mesh().x_desc("nodes").y_desc("percent over the bound").draw()?;
    for (name, points, color) in lines {
        let style = color.stroke_width(2);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, color.filled())))?;
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    area.present()?;
    Ok(())
}
