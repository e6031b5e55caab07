//! Reading WWW-Authenticate (RFC 9110 §11.6.1): which token server a registry names.
//!
//! One header may hold several challenges, and commas separate both challenges and parameters.

use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;

/// Text of one header that is read; longer ones are cut. Real ones have 100 to 300 bytes.
const HEADER_MAX_BYTES: usize = 8 * 1024;
/// Challenges of one answer that are read.
const CHALLENGES_MAX: usize = 8;

/// Where a registry's tokens are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bearer {
    pub(super) realm: String,
    pub(super) service: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
struct Challenge {
    scheme: String,
    parameters: Vec<(String, String)>,
}

impl Challenge {
    fn get(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// The first Bearer challenge with a realm.
pub(super) fn bearer(headers: &HeaderMap) -> Option<Bearer> {
    let texts = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    let mut challenges = texts.flat_map(parse).take(CHALLENGES_MAX);
    challenges.find_map(|challenge| {
        let realm = challenge.get("realm").filter(|_| challenge.scheme == "bearer")?;
        Some(Bearer { realm: realm.to_owned(), service: challenge.get("service").map(str::to_owned) })
    })
}

fn parse(header: &str) -> Vec<Challenge> {
    let mut rest = Rest(header.get(..HEADER_MAX_BYTES).unwrap_or(header));
    let mut challenges: Vec<Challenge> = Vec::new();
    loop {
        rest.skip(|c| c.is_ascii_whitespace() || c == ',');
        let word = rest.take(is_token);
        if word.is_empty() {
            return challenges;
        }
        let spaces = rest.take(|c| c.is_ascii_whitespace());
        match (rest.eat('='), challenges.last_mut()) {
            // `name = value`: of the challenge before it.
            (true, Some(challenge)) => {
                rest.skip(|c| c.is_ascii_whitespace());
                let Some(value) = rest.value() else { return challenges };
                challenge.parameters.push((word.to_ascii_lowercase(), value));
            }
            (true, None) => return challenges,
            (false, _) => {
                challenges.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: Vec::new() });
                if challenges.len() > CHALLENGES_MAX || (spaces.is_empty() && !rest.at_boundary()) {
                    return challenges;
                }
            }
        }
    }
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)
}

struct Rest<'a>(&'a str);

impl<'a> Rest<'a> {
    fn take(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let end = self.0.find(|c| !wanted(c)).unwrap_or(self.0.len());
        let (taken, rest) = self.0.split_at(end);
        self.0 = rest;
        taken
    }

    fn skip(&mut self, unwanted: impl Fn(char) -> bool) {
        self.take(unwanted);
    }

    fn eat(&mut self, wanted: char) -> bool {
        let rest = self.0.strip_prefix(wanted);
        self.0 = rest.unwrap_or(self.0);
        rest.is_some()
    }

    fn at_boundary(&self) -> bool {
        self.0.is_empty() || self.0.starts_with(',')
    }

    /// A token or a quoted string; `None` if the quotes do not end.
    fn value(&mut self) -> Option<String> {
        if !self.eat('"') {
            // Some servers forget the quotes around URLs.
            return Some(self.take(|c| !c.is_ascii_whitespace() && c != ',').to_owned());
        }
        let mut value = String::new();
        let mut characters = self.0.char_indices();
        while let Some((at, c)) = characters.next() {
            match c {
                '"' => {
                    self.0 = &self.0[at + 1..];
                    return Some(value);
                }
                '\\' => value.push(characters.next()?.1),
                c => value.push(c),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(texts: &[&str]) -> Option<Bearer> {
        let mut headers = HeaderMap::new();
        for text in texts {
            headers.append(WWW_AUTHENTICATE, text.parse().unwrap());
        }
        bearer(&headers)
    }

    #[test]
    fn the_token_server_is_found_among_challenges() {
        let wanted = |realm: &str, service: Option<&str>| {
            Some(Bearer { realm: realm.to_owned(), service: service.map(str::to_owned) })
        };
        let hub =
            r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a:pull""#;
        assert_eq!(read(&[hub]), wanted("https://auth.docker.io/token", Some("registry.docker.io")));
        assert_eq!(
            read(&[r#"Basic realm="x, Bearer realm=y", bearer  realm = "https://a/t" , service=s"#]),
            wanted("https://a/t", Some("s"))
        );
        assert_eq!(read(&["Negotiate", r#"Bearer realm="a\"b""#]), wanted("a\"b", None));
        assert_eq!(read(&["Negotiate, Bearer realm=https://a/t"]), wanted("https://a/t", None));
        for none in [
            "",
            "Bearer",
            r#"Basic realm="a""#,
            r#"Bearer realm="unended"#,
            "Bearer service=s",
            "=,=\"",
            "Bearer abc==",
        ] {
            assert_eq!(read(&[none]), None, "{none}");
        }
    }

    proptest! {
        #[test]
        fn no_header_panics(text in "[ -~]{0,200}", any: String) {
            parse(&text);
            parse(&any);
            parse(&format!("Bearer realm=\"{any}"));
        }

        /// Whatever a realm holds, quoting it and reading it gives it back.
        #[test]
        fn a_quoted_realm_is_read_as_it_was_written(realm in "[ -~]{1,60}") {
            let quoted = realm.replace('\\', "\\\\").replace('"', "\\\"");
            let wanted = Bearer { realm, service: Some("s".to_owned()) };
            prop_assert_eq!(read(&[&format!("Basic realm=\"x\", Bearer realm=\"{quoted}\", service=s")]), Some(wanted));
        }
    }
}
