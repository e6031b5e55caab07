//! OpenMetrics text in Prometheus' older format, for whoever does not ask for the newer one: people with curl,
//! promtool, collectors of other vendors.
//!
//! The two differ in their comments alone: here a counter's name has its `_total`, there is no end mark, and no
//! types for what is of none.

/// The content type of the newer format, and of the older.
pub const OPEN: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// The content type of the older format.
pub const PLAIN: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Whether a client's `Accept` asks for OpenMetrics.
pub fn wants_open(accept: Option<&str>) -> bool {
    accept.is_some_and(|accept| accept.contains("application/openmetrics-text"))
}

/// The same in the older format.
pub fn plain(open: &str) -> String {
    let mut page = String::with_capacity(open.len());
    // The help comes before the type, and the type says what name it is for.
    let mut help = None;
    for line in open.lines() {
        match line.strip_prefix("# ").map(|comment| comment.split_once(' ').unwrap_or((comment, ""))) {
            Some(("HELP", said)) => help = said.split_once(' '),
            Some(("TYPE", said)) => {
                let (name, kind) = said.split_once(' ').unwrap_or((said, ""));
                let (suffix, kind) = match kind {
                    "counter" => ("_total", "counter"),
                    "info" => ("_info", "gauge"),
                    "unknown" => ("", "untyped"),
                    kind => ("", kind),
                };
                if let Some((_, words)) = help.take() {
                    page.push_str(&format!("# HELP {name}{suffix} {words}\n"));
                }
                page.push_str(&format!("# TYPE {name}{suffix} {kind}\n"));
            }
            // The end, units.
            Some(_) => {}
            None => {
                page.push_str(line);
                page.push('\n');
            }
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_and_an_info_have_their_suffix_in_the_comments_too() {
        let open = "# HELP darter_pulls Blobs brought here.\n# TYPE darter_pulls counter\n\
                    darter_pulls_total{outcome=\"complete\"} 3\n\
                    # HELP darter_build What runs.\n# TYPE darter_build info\ndarter_build_info{version=\"1 # 2\"} 1\n\
                    # TYPE x unknown\nx 1\n# HELP s A gauge.\n# UNIT s seconds\n# TYPE s gauge\ns 2\n# EOF\n";
        let wanted = "# HELP darter_pulls_total Blobs brought here.\n# TYPE darter_pulls_total counter\n\
                      darter_pulls_total{outcome=\"complete\"} 3\n\
                      # HELP darter_build_info What runs.\n# TYPE darter_build_info gauge\n\
                      darter_build_info{version=\"1 # 2\"} 1\n\
                      # TYPE x untyped\nx 1\n# HELP s A gauge.\n# TYPE s gauge\ns 2\n";
        assert_eq!(plain(open), wanted);
    }

    #[test]
    fn only_who_asks_for_it_gets_the_newer_format() {
        assert!(wants_open(Some(
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
        )));
        assert!(!wants_open(Some("text/plain, */*")) && !wants_open(None));
    }
}
