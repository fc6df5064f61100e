//! Figures of a few measurements.

/// Sorted measurements.
pub(crate) struct Sample(Vec<f64>);

impl Sample {
    pub(crate) fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Middle value, or the mean of the two in the middle; 0 of nothing.
    pub(crate) fn median(&self) -> f64 {
        let count = self.0.len();
        match (count, count % 2) {
            (0, _) => 0.0,
            (_, 1) => self.0[count / 2],
            _ => f64::midpoint(self.0[count / 2 - 1], self.0[count / 2]),
        }
    }

    pub(crate) fn p95(&self) -> f64 {
        self.percentile(95)
    }

    pub(crate) fn p99(&self) -> f64 {
        self.percentile(99)
    }

    /// The smallest value that so many of 100 do not exceed (nearest rank); 0 of nothing.
    fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100);
        self.0.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
    }

    pub(crate) fn smallest(&self) -> f64 {
        self.0.first().copied().unwrap_or(0.0)
    }

    pub(crate) fn largest(&self) -> f64 {
        self.0.last().copied().unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::Sample;

    #[test]
    fn medians_and_ranks() {
        let sample = Sample::new(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((sample.median(), sample.p95(), sample.p99()), (2.5, 4.0, 4.0));
        assert_eq!((sample.smallest(), sample.largest(), sample.len()), (1.0, 4.0, 4));
        let hundred = Sample::new((1..=100).map(f64::from).collect());
        assert_eq!((hundred.median(), hundred.p95(), hundred.p99()), (50.5, 95.0, 99.0));
        assert_eq!(Sample::new(Vec::new()).median(), 0.0);
    }
}
