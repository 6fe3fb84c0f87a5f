//! The pictures of a report, each an SVG. A picture without data is none.

use std::collections::BTreeMap;

use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::runs::{DrawnRequest, Run};

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;
type Points = Vec<(f64, f64)>;

const SIZE: (u32, u32) = (760, 380);
/// Points of one curve or cloud: more than a screen has columns shows nothing new.
const NUM_POINTS_MAX: usize = 1500;
/// Requests of a timeline.
const NUM_ROWS_MAX: usize = 300;
/// Told apart also by people who see red and green alike (Okabe and Ito's palette).
const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];

/// What the parts of a request are painted in, in the order in which they happen.
const PHASES: [(&str, RGBColor); 6] = [
    ("not sent yet", RGBColor(200, 200, 200)),
    ("queue", RGBColor(230, 159, 0)),
    ("prefill", RGBColor(0, 114, 178)),
    ("until token #1, otherwise", RGBColor(86, 180, 233)),
    ("tokens", RGBColor(0, 158, 115)),
    ("failed", RGBColor(213, 94, 0)),
];

/// Runs by label, in order of their names, with a colour each.
pub(super) fn by_label(runs: &[Run]) -> Vec<(&str, RGBColor, Vec<&Run>)> {
    let mut by_label: BTreeMap<&str, Vec<&Run>> = BTreeMap::new();
    for run in runs {
        by_label.entry(&run.label).or_default().push(run);
    }
    by_label.into_iter().zip(COLORS.iter().cycle()).map(|((label, runs), color)| (label, *color, runs)).collect()
}

/// Share of the samples at or below each value, a curve per label; the horizontal axis ends at the largest p99.9.
pub(super) fn cdf(runs: &[Run], x_title: &str, samples: fn(&Run) -> Vec<f64>) -> anyhow::Result<Option<String>> {
    let mut curves = Vec::new();
    let mut x_max = 0.0f64;
    for (label, color, runs) in by_label(runs) {
        let mut all: Vec<f64> = runs.into_iter().flat_map(samples).collect();
        if all.is_empty() {
            continue;
        }
        all.sort_by(f64::total_cmp);
        x_max = x_max.max(all[(all.len() - 1) * 999 / 1000]);
        let step = all.len().div_ceil(NUM_POINTS_MAX);
        let share = |index: usize| (index + 1) as f64 / all.len() as f64 * 100.0;
        let points: Points = (0..all.len()).step_by(step).chain([all.len() - 1]).map(|i| (all[i], share(i))).collect();
        curves.push((label, color, points));
    }
    chart((x_title, "% of samples"), (x_max, Some(100.0)), &curves, Shape::Line)
}

/// Every answered request by its TTFT and its mean time per token.
pub(super) fn plane(runs: &[Run]) -> anyhow::Result<Option<String>> {
    let clouds = series(runs, |run| run.requests().iter().filter_map(DrawnRequest::ttft_and_tpot).collect());
    chart(("TTFT (ms)", "TPOT (ms)"), (0.0, None), &clouds, Shape::Points)
}

/// A figure against the rate that was asked for, of runs with a finite rate.
pub(super) fn against_rate(runs: &[Run], y_title: &str, key: &str) -> anyhow::Result<Option<String>> {
    let mut curves = series(runs, |run| run.figure("request_rate").zip(run.figure(key)).into_iter().collect());
    for (_, _, points) in &mut curves {
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
    }
    chart(("requests per second", y_title), (0.0, None), &curves, Shape::LineWithPoints)
}

/// Throughput against how fast an answer is for its reader; a line joins the runs of a label that no other run of
/// it is better than in both.
pub(super) fn pareto(runs: &[Run]) -> anyhow::Result<Option<String>> {
    let point = |run: &Run| {
        let tpot = run.figure("mean_tpot_ms").filter(|tpot| *tpot > 0.0)?;
        Some((1e3 / tpot, run.figure("output_throughput")?))
    };
    let mut fronts = Vec::new();
    for (label, color, points) in series(runs, |run| point(run).into_iter().collect()) {
        fronts.push((label, color, front(points)));
    }
    let titles = ("tokens per second for one reader", "tokens per second of all");
    chart(titles, (0.0, None), &fronts, Shape::LineWithPoints)
}

/// Of `points`, those that no other is at least as good as in both coordinates, by the first.
fn front(mut points: Points) -> Points {
    points.sort_by(|one, other| other.0.total_cmp(&one.0).then(other.1.total_cmp(&one.1)));
    let mut best = f64::NEG_INFINITY;
    points.retain(|point| {
        point.1 > best && {
            best = point.1;
            true
        }
    });
    points.reverse();
    points
}

/// The requests of one run, a row each, painted by what they were waiting for.
pub(super) fn timeline(run: &Run) -> anyhow::Result<Option<String>> {
    let requests = run.requests();
    if requests.is_empty() {
        return Ok(None);
    }
    let rows: Vec<&DrawnRequest> = requests.iter().take(NUM_ROWS_MAX).collect();
    let seconds = rows.iter().map(|request| request.ended).fold(0.0, f64::max) / 1e3;
    let height = 90 + 6 * rows.len() as u32;
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (SIZE.0, height.max(200))).into_drawing_area();
        let mut chart = frame(&root, (seconds, rows.len() as f64), ("seconds", "request"))?;
        for (phase, (name, color)) in PHASES.iter().enumerate() {
            let bars = rows.iter().enumerate().filter_map(|(row, request)| {
                let (from, to) = spans(request)[phase]?;
                let (top, bottom) = (row as f64 + 0.1, row as f64 + 0.9);
                Some(Rectangle::new([(from / 1e3, top), (to / 1e3, bottom)], color.filled()))
            });
            let color = *color;
            let legend = move |(x, y): (i32, i32)| Rectangle::new([(x, y - 4), (x + 14, y + 4)], color.filled());
            let bars: Vec<_> = bars.collect();
            if !bars.is_empty() {
                chart.draw_series(bars)?.label(*name).legend(legend);
            }
        }
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw()?;
        root.present()?;
    }
    Ok(Some(svg))
}

/// When each of [`PHASES`] was, in milliseconds. The endpoint's own phases are laid behind each other from the
/// moment of sending: they are durations, and when they began is not known here.
fn spans(request: &DrawnRequest) -> [Option<(f64, f64)>; PHASES.len()] {
    let span = |from: f64, to: f64| (to > from).then_some((from, to));
    let waiting = span(request.scheduled, request.sent);
    let Some((first, last)) = request.answer else {
        return [waiting, None, None, None, None, span(request.sent, request.ended)];
    };
    let [queue, prefill, _] = request.phases.unwrap_or_default();
    let queued = (request.sent + queue).min(first);
    let prefilled = (queued + prefill).min(first);
    [waiting, span(request.sent, queued), span(queued, prefilled), span(prefilled, first), span(first, last), None]
}

fn series(runs: &[Run], points: impl Fn(&Run) -> Points) -> Vec<(&str, RGBColor, Points)> {
    let of_label = |(label, color, runs): (_, _, Vec<&Run>)| {
        let all: Points = runs.into_iter().flat_map(&points).collect();
        let step = all.len().div_ceil(NUM_POINTS_MAX).max(1);
        (label, color, all.into_iter().step_by(step).collect())
    };
    by_label(runs).into_iter().map(of_label).collect()
}

#[derive(Clone, Copy, PartialEq)]
enum Shape {
    Line,
    Points,
    LineWithPoints,
}

/// Both axes begin at 0; they end at `ends` or, where that is less, at the largest point.
fn chart(
    titles: (&str, &str),
    ends: (f64, Option<f64>),
    series: &[(&str, RGBColor, Points)],
    shape: Shape,
) -> anyhow::Result<Option<String>> {
    let all = || series.iter().flat_map(|(_, _, points)| points);
    if all().next().is_none() {
        return Ok(None);
    }
    let largest = |of: fn(&(f64, f64)) -> f64| all().map(of).fold(0.0, f64::max) * 1.05;
    let x_max = if ends.0 > 0.0 { ends.0 } else { largest(|point| point.0) };
    let y_max = ends.1.unwrap_or_else(|| largest(|point| point.1));
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = frame(&root, (x_max, y_max), titles)?;
        for (label, color, points) in series.iter().filter(|(_, _, points)| !points.is_empty()) {
            let color = *color;
            if shape != Shape::Points {
                let seen = points.iter().copied().filter(|point| point.0 <= x_max);
                let line = chart.draw_series(LineSeries::new(seen, color.stroke_width(2)))?;
                line.label(*label).legend(move |(x, y)| PathElement::new([(x, y), (x + 14, y)], color.stroke_width(2)));
            }
            if shape != Shape::Line {
                let dots = points.iter().map(|point| Circle::new(*point, 3, color.mix(0.6).filled()));
                let dots = chart.draw_series(dots)?;
                if shape == Shape::Points {
                    dots.label(*label).legend(move |(x, y)| Circle::new((x + 7, y), 3, color.filled()));
                }
            }
        }
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw()?;
        root.present()?;
    }
    Ok(Some(svg))
}

fn frame<'a, 'b>(
    root: &DrawingArea<SVGBackend<'b>, plotters::coord::Shift>,
    (x_max, y_max): (f64, f64),
    (x_title, y_title): (&str, &str),
) -> anyhow::Result<Chart<'a, 'b>> {
    root.fill(&WHITE)?;
    let some = |max: f64| if max > 0.0 { max } else { 1.0 };
    let mut chart = ChartBuilder::on(root)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..some(x_max), 0.0..some(y_max))?;
    chart.configure_mesh().light_line_style(WHITE).x_desc(x_title).y_desc(y_title).draw()?;
    Ok(chart)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_front_is_what_nothing_is_better_than() {
        let points = vec![(1.0, 9.0), (2.0, 8.0), (1.5, 5.0), (3.0, 8.0), (4.0, 1.0), (1.0, 9.0)];
        assert_eq!(front(points), [(1.0, 9.0), (3.0, 8.0), (4.0, 1.0)]);
        assert!(front(vec![]).is_empty());
    }

    #[test]
    fn phases_never_reach_behind_the_first_token() {
        let request = DrawnRequest {
            scheduled: 0.0,
            sent: 10.0,
            ended: 100.0,
            answer: Some((50.0, 90.0)),
            num_output_tokens: 5.0,
            phases: Some([5.0, 20.0, 1.0]),
        };
        let expected =
            [Some((0.0, 10.0)), Some((10.0, 15.0)), Some((15.0, 35.0)), Some((35.0, 50.0)), Some((50.0, 90.0)), None];
        assert_eq!(spans(&request), expected);
        let slow = DrawnRequest { phases: Some([5.0, 500.0, 1.0]), ..request.clone() };
        assert_eq!(spans(&slow)[2..4], [Some((15.0, 50.0)), None]);
        let failed = DrawnRequest { answer: None, ..request };
        assert_eq!(spans(&failed)[5], Some((10.0, 100.0)));
    }

    #[test]
    fn a_picture_without_data_is_none() {
        let run = Run { label: "a".into(), result: serde_json::json!({"request_rate": "inf"}) };
        let runs = [run];
        assert!(cdf(&runs, "x", Run::ttfts_ms).unwrap().is_none());
        assert!(plane(&runs).unwrap().is_none() && pareto(&runs).unwrap().is_none());
        assert!(against_rate(&runs, "y", "request_goodput").unwrap().is_none());
        assert!(timeline(&runs[0]).unwrap().is_none());
    }
}
