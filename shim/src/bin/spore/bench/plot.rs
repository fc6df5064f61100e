//! Every run as a dot, as SVG or as a page with that in it. What comes from outside is escaped: in the SVG by plotters, in the page
//! here.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::figures::{Row, milliseconds};
use super::report::Report;
use crate::failure::Failure;

/// In pixels, as are all that follow.
const WIDTH: u32 = 1000;
const FRAME: u32 = 150;
const STRIP: u32 = 64;
const NAMES: u32 = 90;
const UNITS: u32 = 44;
/// Of a strip's height: where its dots lie, and how far its marks reach from its middle.
const SPREAD: f64 = 0.5;
const REACH: f64 = 0.36;
/// Steps by which dots that come after each other lie apart.
const STEPS: usize = 29;
const FONT: &str = "sans-serif";
const DOT: RGBColor = RGBColor(90, 90, 90);
const P50: RGBColor = RGBColor(0, 90, 200);
const P95: RGBColor = RGBColor(200, 40, 0);
const LEGEND: &str = "each dot is a run; blue: p50, red: p95";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Svg,
    Html,
}

/// Where the plot goes.
#[derive(Debug, Clone)]
pub(crate) struct Plot {
    path: PathBuf,
    format: Format,
}

impl std::str::FromStr for Plot {
    type Err = String;

    fn from_str(path: &str) -> Result<Self, String> {
        let path = PathBuf::from(path);
        let extension = path.extension().map(std::ffi::OsStr::to_ascii_lowercase);
        let format = match extension.as_deref().and_then(std::ffi::OsStr::to_str) {
            Some("svg") => Format::Svg,
            Some("html") => Format::Html,
            _ => return Err("name a file that ends with .svg or .html".into()),
        };
        Ok(Self { path, format })
    }
}

impl Plot {
    /// Before anything is measured that could then not be shown.
    pub(super) fn check(&self) -> Result<(), Failure> {
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let found = std::fs::metadata(parent).map_err(Failure::host("look at", parent))?;
        let cannot = |kind: ErrorKind| Err(Failure::host("write", &self.path)(kind.into()));
        match (found.is_dir(), self.path.is_dir()) {
            (false, _) => cannot(ErrorKind::NotADirectory),
            (true, true) => cannot(ErrorKind::IsADirectory),
            (true, false) => Ok(()),
        }
    }

    pub(super) fn write(&self, report: &Report) -> Result<(), Failure> {
        let svg = svg(report).map_err(|error| Failure::Refused(format!("draw the plot: {error}")))?;
        let text = if self.format == Format::Svg { svg } else { page(&report.title(), &svg) };
        std::fs::write(&self.path, text).map_err(Failure::host("write", &self.path))
    }
}

fn page(title: &str, svg: &str) -> String {
    let title = title.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"><title>spore bench: {title}</title></head>\n<body>\n{svg}</body>\n</html>\n"
    )
}

/// The decades, in milliseconds, in which all times lie.
fn decades(rows: &[Row]) -> (f64, f64) {
    let times = || rows.iter().flat_map(|row| &row.samples_ns).copied();
    let [least, most] =
        [times().min(), times().max()].map(|time| milliseconds(time.unwrap_or(1_000_000).max(1)));
    let begin = 10f64.powf(least.log10().floor());
    let end = 10f64.powf(most.log10().ceil());
    // One time alone may be a power of ten.
    (begin, if end > begin { end } else { begin * 10.0 })
}

/// Dots that come after each other lie apart: from minus to plus one half.
#[allow(clippy::cast_precision_loss, reason = "it is one of few steps")]
fn apart(index: usize) -> f64 {
    // 12 and 29 have no divisor in common, so that each step is taken once before one is taken again.
    ((index % STEPS) * 12 % STEPS) as f64 / (STEPS - 1) as f64 - 0.5
}

type Drawn<'a> = DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>;

fn svg(report: &Report) -> Result<String, String> {
    let mut text = String::new();
    draw(report, &mut text).map_err(|error| error.to_string())?;
    Ok(text)
}

#[allow(clippy::cast_precision_loss, reason = "there are few operations")]
fn draw<'a>(report: &Report, text: &'a mut String) -> Result<(), Drawn<'a>> {
    let rows = &report.operations;
    let strips = u32::try_from(rows.len()).unwrap_or(u32::MAX).min(64);
    let root = SVGBackend::with_string(text, (WIDTH, FRAME + strips * STRIP)).into_drawing_area();
    root.fill(&WHITE)?;
    let below = root.titled(&report.title(), (FONT, 20))?;
    let at_once = rows.first().map_or(1, |row| row.concurrency);
    let below = below.titled(&format!("{}; {at_once} at once; {LEGEND}", report.place()), (FONT, 15))?;

    let (begin, end) = decades(rows);
    let height = f64::from(strips);
    let mut chart = ChartBuilder::on(&below)
        .margin(16)
        .x_label_area_size(UNITS)
        .y_label_area_size(NAMES)
        .build_cartesian_2d((begin..end).log_scale(), 0.0..height)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .label_style((FONT, 16))
        .axis_desc_style((FONT, 16))
        .x_desc("milliseconds, logarithmic")
        .x_label_formatter(&|ms| format!("{ms}"))
        .draw()?;

    let name = (FONT, 17).into_text_style(&root).pos(Pos::new(HPos::Right, VPos::Center));
    for (index, row) in rows.iter().enumerate() {
        // The first is on top.
        let middle = height - index as f64 - 0.5;
        let (x, y) = chart.backend_coord(&(begin, middle));
        root.draw_text(row.operation.name(), &name, (x - 10, y))?;
        let dots = row.samples_ns.iter().enumerate().map(|(at, time)| {
            Circle::new((milliseconds(*time), middle + SPREAD * apart(at)), 3, DOT.mix(0.5).filled())
        });
        chart.draw_series(dots)?;
        let marks = row.figures.map(|of| [(of.p50_ns, P50), (of.p95_ns, P95)]);
        chart.draw_series(marks.into_iter().flatten().map(|(time, color)| {
            let x = milliseconds(time);
            PathElement::new(vec![(x, middle - REACH), (x, middle + REACH)], color.stroke_width(2))
        }))?;
    }
    root.present()
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    /// Elements that are closed in the order in which they were opened, and no character that XML does not have.
    fn is_well_formed(text: &str) {
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'));
        let mut open = Vec::new();
        for part in text.split('<').skip(1) {
            let (tag, between) = part.split_once('>').unwrap_or_else(|| panic!("<{part}"));
            assert!(!between.contains('>') && tag.matches('"').count() % 2 == 0, "<{part}");
            for entity in between.split('&').skip(1).chain(tag.split('&').skip(1)) {
                assert!(
                    ["amp;", "lt;", "gt;", "quot;", "apos;"].iter().any(|known| entity.starts_with(known))
                );
            }
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name));
            } else if !tag.ends_with('/') {
                open.push(tag.split_whitespace().next().unwrap());
            }
        }
        assert!(open.is_empty(), "{open:?}");
    }

    #[test]
    fn every_run_is_a_dot_and_nothing_from_outside_is_markup() {
        let hostile = report("</text><script>alert(1)</script>&\"'\x1b[2J");
        let svg = svg(&hostile).unwrap();
        assert!(svg.starts_with("<svg"), "{svg:.100}");
        is_well_formed(&svg);
        assert!(!svg.contains("<script") && svg.contains("&lt;script&gt;"), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 3);
        for part in ["exec", "create", "milliseconds", "p95", "2026-11-23", "#005AC8"] {
            assert!(svg.contains(part), "{part} is not in {svg}");
        }
        let page = page(&hostile.title(), &svg);
        assert!(page.starts_with("<!doctype html>") && !page.contains("<script"));
    }

    #[test]
    fn without_a_run_there_is_still_a_plot() {
        let mut none = report("busybox");
        none.operations.remove(0);
        is_well_formed(&svg(&none).unwrap());
        none.operations.clear();
        is_well_formed(&svg(&none).unwrap());
    }

    #[test]
    fn all_times_lie_within_the_axis() {
        let mut of = report("busybox").operations;
        assert_eq!(decades(&of), (10.0, 100.0));
        of[0].samples_ns = vec![1_000_000];
        assert_eq!(decades(&of), (1.0, 10.0));
        of[0].samples_ns = vec![0, u64::MAX];
        let (begin, end) = decades(&of);
        assert!(begin > 0.0 && begin < 1e-5 && end > 1e13 && end.is_finite());
        let steps: Vec<_> = (0..STEPS).map(apart).collect();
        assert!(steps.iter().all(|step| (-0.5..=0.5).contains(step)));
        let are_apart =
            |(at, step): (usize, &f64)| steps[..at].iter().all(|other| (other - step).abs() > 0.01);
        assert!(steps.iter().enumerate().all(are_apart));
    }

    #[test]
    fn the_files_name_says_what_it_is() {
        for (name, format) in [("a.svg", Format::Svg), ("/x/b.HTML", Format::Html)] {
            assert_eq!(name.parse::<Plot>().unwrap().format, format);
        }
        for bad in ["", "svg", ".svg", "a.png", "a.svg/", "a.svg.gz"] {
            let parsed = bad.parse::<Plot>();
            assert!(parsed.is_err() || bad == "a.svg/", "{bad}");
        }
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).to_string_lossy().parse::<Plot>().unwrap();
        at("a.svg").check().unwrap();
        assert!(at("no/a.svg").check().is_err());
        std::fs::create_dir(directory.path().join("b.svg")).unwrap();
        assert!(at("b.svg").check().is_err());
        at("a.html").write(&report("busybox")).unwrap();
        let text = std::fs::read_to_string(directory.path().join("a.html")).unwrap();
        assert!(text.starts_with("<!doctype html>") && text.contains("<svg"));
    }
}
