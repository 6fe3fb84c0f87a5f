//! What a process says about itself on `/metrics`.

use std::collections::{BTreeMap, BTreeSet};

/// One scrape.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scrape {
    samples: Vec<Sample>,
    /// Name to counter, gauge or histogram.
    kinds: BTreeMap<String, String>,
}

#[derive(Debug, Clone)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Scrape {
    /// Reads Prometheus' text format.
    pub(crate) fn parse(text: &str) -> Self {
        let samples = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(parse_sample);
        let kinds = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
        let kinds = kinds.map(|(name, kind)| (name.to_string(), kind.to_string())).collect();
        Self { samples: samples.collect(), kinds }
    }

    /// Joins what several processes said.
    pub(crate) fn join(scrapes: impl IntoIterator<Item = Scrape>) -> Self {
        let mut joined = Self::default();
        for scrape in scrapes {
            joined.samples.extend(scrape.samples);
            joined.kinds.extend(scrape.kinds);
        }
        joined
    }

    /// Every metric with its type.
    pub(crate) fn kinds(&self) -> &BTreeMap<String, String> {
        &self.kinds
    }

    /// The roles that say something of a metric, a histogram's buckets counted as itself.
    pub(crate) fn roles_of(&self, name: &str) -> BTreeSet<&str> {
        let is_of = |sample: &&Sample| sample.name == name || sample.name == format!("{name}_count");
        self.samples.iter().filter(is_of).filter_map(|sample| sample.labels.get("role").map(String::as_str)).collect()
    }

    /// The values of a metric by the label `node`, of those that have all of `labels`; added up within a node.
    pub(crate) fn by_node(&self, name: &str, labels: &[(&str, &str)]) -> BTreeMap<String, f64> {
        sums(self.find(name, labels), "node")
    }

    /// The values of a metric by any label.
    pub(crate) fn by_label(&self, name: &str, label: &str) -> BTreeMap<String, f64> {
        sums(self.find(name, &[]), label)
    }

    /// The sum of a metric's samples that have all of `labels`; zero if there is none.
    pub(crate) fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.find(name, labels).map(|sample| sample.value).sum()
    }

    /// The transports over which KV was verified on arrival at decode nodes. What prefill nodes fetch is not among them:
    /// it always takes `quic`.
    pub(crate) fn kv_transports(&self) -> Vec<String> {
        let verified = [("role", "decode-node"), ("direction", "verified")];
        let bytes = sums(self.find("tandem_fabric_extent_bytes_total", &verified), "transport");
        bytes.into_iter().filter(|(_, bytes)| *bytes > 0.0).map(|(transport, _)| transport).collect()
    }

    fn find(&self, name: &str, labels: &[(&str, &str)]) -> impl Iterator<Item = &Sample> {
        let has_labels = move |sample: &&Sample| {
            labels.iter().all(|(key, value)| sample.labels.get(*key).is_some_and(|found| found == value))
        };
        self.samples.iter().filter(move |sample| sample.name == name).filter(has_labels)
    }
}

fn sums<'a>(samples: impl Iterator<Item = &'a Sample>, label: &str) -> BTreeMap<String, f64> {
    let mut values = BTreeMap::new();
    for sample in samples {
        *values.entry(sample.labels.get(label).cloned().unwrap_or_default()).or_default() += sample.value;
    }
    values
}

/// `name{key="value",...} 1.5`
fn parse_sample(line: &str) -> Sample {
    let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
    let (name, labels) = match series.split_once('{') {
        Some((name, labels)) => (name, labels.strip_suffix('}').unwrap_or_else(|| panic!("open labels: {line}"))),
        None => (series, ""),
    };
    // No label of ours holds a quote.
    let mut parsed = BTreeMap::new();
    for label in labels.split("\",").filter(|label| !label.is_empty()) {
        let (key, value) = label.split_once("=\"").unwrap_or_else(|| panic!("no label: {line}"));
        parsed.insert(key.to_string(), value.trim_end_matches('"').to_string());
    }
    let value = value.parse().unwrap_or_else(|_| panic!("no value: {line}"));
    Sample { name: name.to_string(), labels: parsed, value }
}

#[test]
fn samples_are_read_with_their_labels() {
    let scrape = Scrape::parse("# HELP a b\na{role=\"x\",node=\"n-0\"} 2\na{role=\"y\",node=\"n-1\"} 3\n\nb 1.5\n");
    assert_eq!(scrape.sum("a", &[]), 5.0);
    assert_eq!(scrape.sum("a", &[("role", "y")]), 3.0);
    assert_eq!(scrape.by_node("a", &[])["n-0"], 2.0);
    assert_eq!(scrape.sum("b", &[]), 1.5);
    assert_eq!(scrape.sum("c", &[]), 0.0);
}
