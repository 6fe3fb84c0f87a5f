//! The HTML around the charts.

use std::fmt::Write;

use super::charts;
use super::runs::Run;

/// Timelines of more runs than this are left out, and the page says so.
const NUM_TIMELINES_MAX: usize = 6;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:64rem;padding:0 1rem;color:#222}\
    table{border-collapse:collapse;font-size:13px}th,td{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:right}\
    th:first-child,td:first-child{text-align:left}.wide{overflow-x:auto}code{font-size:12px;word-break:break-all}\
    svg{max-width:100%;height:auto}h2{margin-top:2.5rem}.warning{color:#a33}";

/// Columns of the table: heading, key, decimals.
const COLUMNS: [(&str, &str, usize); 13] = [
    ("answered", "completed", 0),
    ("failed", "failed", 0),
    ("requests/s", "request_throughput", 2),
    ("goodput", "request_goodput", 2),
    ("SLO met", "slo_attainment", 3),
    ("tokens/s", "output_throughput", 1),
    ("TTFT p50", "median_ttft_ms", 1),
    ("p99", "p99_ttft_ms", 1),
    ("ITL p50", "median_itl_ms", 2),
    ("p99", "p99_itl_ms", 2),
    ("E2EL p50", "median_e2el_ms", 1),
    ("p99", "p99_e2el_ms", 1),
    ("cached tokens", "total_cached_tokens", 0),
];

/// The whole page.
///
/// # Errors
/// If a chart cannot be drawn.
pub(super) fn page(title: &str, runs: &[Run]) -> anyhow::Result<String> {
    let mut html = String::new();
    let title = escaped(title);
    write!(
        html,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style>\
         </head><body><h1>{title}</h1>"
    )?;
    write_table(&mut html, runs)?;
    let figures = [
        ("Time to first token", charts::cdf(runs, "TTFT (ms)", Run::ttfts_ms)?),
        ("Time between tokens", charts::cdf(runs, "ITL (ms)", Run::itls_ms)?),
        ("End to end", charts::cdf(runs, "E2EL (ms)", Run::e2els_ms)?),
        ("TTFT and TPOT of each request", charts::plane(runs)?),
        ("Goodput against rate", charts::against_rate(runs, "goodput (requests per second)", "request_goodput")?),
        ("p99 ITL against rate", charts::against_rate(runs, "p99 ITL (ms)", "p99_itl_ms")?),
        ("Throughput and speed for a reader: the Pareto front", charts::pareto(runs)?),
    ];
    for (title, svg) in figures {
        if let Some(svg) = svg {
            write!(html, "<h2>{title}</h2>{svg}")?;
        }
    }
    write_timelines(&mut html, runs)?;
    write_sources(&mut html, runs)?;
    html.push_str("</body></html>\n");
    Ok(html)
}

fn write_table(html: &mut String, runs: &[Run]) -> anyhow::Result<()> {
    html.push_str("<div class=\"wide\"><table><tr><th>run</th><th>rate</th>");
    for (heading, _, _) in COLUMNS {
        write!(html, "<th>{heading}</th>")?;
    }
    html.push_str("</tr>");
    for run in runs {
        let rate = match &run.result["request_rate"] {
            serde_json::Value::Number(rate) => rate.to_string(),
            _ => "inf".into(),
        };
        write!(html, "<tr><td>{}</td><td>{rate}</td>", escaped(&run.label))?;
        for (_, key, decimals) in COLUMNS {
            match run.figure(key) {
                Some(value) => write!(html, "<td>{value:.decimals$}</td>")?,
                None => html.push_str("<td>-</td>"),
            }
        }
        html.push_str("</tr>");
    }
    html.push_str("</table></div><p>Times in milliseconds.</p>");
    for run in runs {
        for warning in run.result["warnings"].as_array().into_iter().flatten().filter_map(|one| one.as_str()) {
            write!(html, "<p class=\"warning\">{}: {}</p>", escaped(&run.label), escaped(warning))?;
        }
    }
    Ok(())
}

fn write_timelines(html: &mut String, runs: &[Run]) -> anyhow::Result<()> {
    let mut num_left_out = 0;
    let mut num_drawn = 0;
    for run in runs {
        if num_drawn == NUM_TIMELINES_MAX {
            num_left_out += usize::from(!run.requests().is_empty());
        } else if let Some(svg) = charts::timeline(run)? {
            num_drawn += 1;
            write!(html, "<h2>Requests over time: {}</h2>{svg}", escaped(&run.label))?;
        }
    }
    if num_left_out > 0 {
        write!(html, "<p>The timelines of {num_left_out} further runs are left out.</p>")?;
    }
    Ok(())
}

/// Where the figures come from: a number without its command is not to be trusted.
fn write_sources(html: &mut String, runs: &[Run]) -> anyhow::Result<()> {
    html.push_str("<h2>Where the figures come from</h2><ul>");
    for run in runs {
        let text = |key: &str| escaped(run.result[key].as_str().unwrap_or("unknown"));
        let machine = &run.result["machine"];
        let cpu_model = escaped(machine["cpu_model"].as_str().unwrap_or("an unknown processor"));
        let (label, command, commit) = (escaped(&run.label), text("command"), text("commit"));
        let num_cores = &machine["num_cores"];
        write!(html, "<li>{label}: <code>{command}</code>, commit {commit}, {num_cores} cores of {cpu_model}</li>")?;
    }
    html.push_str("</ul>");
    Ok(())
}

/// Text that is text in HTML too: labels and commands come from files.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn run(label: &str, rate: f64) -> Run {
        let request = json!({"scheduled_ms": 0.0, "sent_ms": 1.0, "ended_ms": 50.0, "first_ms": 20.0, "last_ms": 40.0,
            "output_tokens": 3});
        let result = json!({"completed": 1, "duration": 1.0, "request_rate": rate, "request_goodput": rate / 2.0,
            "mean_tpot_ms": 10.0, "p99_itl_ms": 12.0, "output_throughput": 3.0, "itls": [[0.01, 0.01]],
            "requests": [request], "warnings": ["it <fell> behind"], "command": "tandem bench serve"});
        Run { label: label.into(), result }
    }

    #[test]
    fn a_page_has_every_chart_and_fetches_nothing() {
        let page = page("A & B", &[run("<split>", 1.0), run("<split>", 2.0), run("colocated", 1.0)]).unwrap();
        assert_eq!(page.matches("<svg").count(), 7 + 3);
        assert!(page.contains("&lt;split&gt;") && !page.contains("<split>"));
        assert!(page.contains("it &lt;fell&gt; behind") && page.contains("tandem bench serve"));
        for fetched in ["<script", "<link", "src=", "@import", "url("] {
            assert!(!page.contains(fetched), "{fetched}");
        }
    }

    #[test]
    fn further_timelines_are_left_out_and_it_says_so() {
        let page = page("many", &vec![run("a", 1.0); NUM_TIMELINES_MAX + 2]).unwrap();
        assert!(page.contains("timelines of 2 further runs"));
    }
}
