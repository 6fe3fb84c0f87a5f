//! What a request must meet to count as good.

use std::str::FromStr;

use super::record::Latencies;

/// A latency, by the name that flags and results use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Metric {
    /// Time to first token.
    Ttft,
    /// Mean time per output token behind the first, of one request.
    Tpot,
    /// Inter-token latency.
    Itl,
    /// End-to-end latency.
    E2el,
}

impl Metric {
    /// All, in the order of reports.
    pub const ALL: [Self; 4] = [Self::Ttft, Self::Tpot, Self::Itl, Self::E2el];

    /// The name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tpot => "tpot",
            Self::Itl => "itl",
            Self::E2el => "e2el",
        }
    }
}

/// One objective: `NAME:MILLISECONDS`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    /// What is limited.
    pub metric: Metric,
    /// To at most this.
    pub limit_ms: f64,
}

impl FromStr for Objective {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, limit) = text.split_once(':').ok_or("expected NAME:MILLISECONDS, such as ttft:500")?;
        let metric = Metric::ALL
            .into_iter()
            .find(|metric| metric.as_str() == name)
            .ok_or_else(|| format!("\"{name}\" is none of ttft, tpot, itl, e2el"))?;
        let limit_ms: f64 = limit.parse().map_err(|_| format!("\"{limit}\" is no number of milliseconds"))?;
        if !(limit_ms.is_finite() && limit_ms >= 0.0) {
            return Err(format!("{limit} ms is no limit"));
        }
        Ok(Self { metric, limit_ms })
    }
}

impl Objective {
    /// Whether an answered request meets it. Of ITL, the largest counts: one long gap is what a reader sees.
    /// An answer of one token has neither TPOT nor ITL and meets both.
    pub fn is_met(&self, latencies: &Latencies) -> bool {
        let found = match self.metric {
            Metric::Ttft => Some(latencies.ttft_ms),
            Metric::Tpot => latencies.tpot_ms,
            Metric::Itl => latencies.itl_ms.iter().copied().reduce(f64::max),
            Metric::E2el => Some(latencies.e2el_ms),
        };
        found.is_none_or(|ms| ms <= self.limit_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objective(text: &str) -> Result<Objective, String> {
        text.parse()
    }

    #[test]
    fn an_objective_is_a_name_and_a_limit() {
        assert_eq!(objective("itl:12.5"), Ok(Objective { metric: Metric::Itl, limit_ms: 12.5 }));
        for wrong in ["ttft", "ttft:", "ttft:-1", "ttft:inf", "ttft:NaN", "p99:5", ":5", "TTFT:5"] {
            assert!(objective(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn each_objective_looks_at_its_own_latency() {
        let latencies = Latencies {
            ttft_ms: 50.0,
            scheduled_ttft_ms: 500.0,
            tpot_ms: Some(20.0),
            itl_ms: vec![10.0, 30.0],
            e2el_ms: 90.0,
            scheduled_e2el_ms: 900.0,
            is_itl_exact: true,
        };
        let is_met = |text: &str| objective(text).expect("a right objective").is_met(&latencies);
        for (met, missed) in
            [("ttft:50", "ttft:49.9"), ("tpot:20", "tpot:19"), ("itl:30", "itl:29"), ("e2el:90", "e2el:89")]
        {
            assert!(is_met(met), "{met}");
            assert!(!is_met(missed), "{missed}");
        }
        let short = Latencies { tpot_ms: None, itl_ms: vec![], ..latencies };
        assert!(objective("tpot:1").is_ok_and(|objective| objective.is_met(&short)));
        assert!(objective("itl:1").is_ok_and(|objective| objective.is_met(&short)));
    }
}
