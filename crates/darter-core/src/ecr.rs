//! Which registries are Amazon ECR, and what their names tell: account, region, API endpoint.
//!
//! Source: the host pattern of the ECR credential helper and of Kubernetes' ecr-credential-provider.

use crate::names::Registry;

/// The DNS suffix of each AWS partition that has ECR, and the suffix of its API endpoints.
const SUFFIXES: [&str; 9] = [
    "amazonaws.com",
    "amazonaws.com.cn",
    "amazonaws.eu",
    "on.aws",
    "on.amazonwebservices.com.cn",
    "sc2s.sgov.gov",
    "c2s.ic.gov",
    "cloud.adc-e.uk",
    "csp.hci.ic.gov",
];

/// An ECR registry, as its host name says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ecr {
    /// `<account>.dkr.ecr.<region>.<suffix>` and its FIPS and dual-stack forms.
    Private {
        /// The 12 digits.
        account: String,
        /// Such as `us-east-1`.
        region: String,
        /// The partition's DNS suffix.
        suffix: String,
        /// Whether the name asks for FIPS endpoints.
        fips: bool,
    },
    /// `public.ecr.aws` and its dual-stack form.
    Public,
}

impl Ecr {
    /// Recognises an ECR host; `None` for any other registry.
    pub fn recognise(registry: &Registry) -> Option<Self> {
        let host = registry.as_str().to_ascii_lowercase();
        if host == "public.ecr.aws" || host == "ecr-public.aws.com" {
            return Some(Self::Public);
        }
        let (account, rest) = host.split_once('.')?;
        let is_account = account.len() == 12 && account.bytes().all(|b| b.is_ascii_digit());
        let rest = rest.strip_prefix("dkr.ecr").or_else(|| rest.strip_prefix("dkr-ecr")).filter(|_| is_account)?;
        let (rest, fips) = match rest.strip_prefix("-fips") {
            Some(rest) => (rest, true),
            None => (rest, false),
        };
        let (region, suffix) = rest.strip_prefix('.')?.split_once('.')?;
        let is_region = region.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
            && region.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        (is_region && SUFFIXES.contains(&suffix)).then(|| Self::Private {
            account: account.to_owned(),
            region: region.to_owned(),
            suffix: suffix.to_owned(),
            fips,
        })
    }

    /// The registry host of an account in a region, for the partition that the region belongs to.
    pub fn host(account: &str, region: &str) -> String {
        let suffix = match region {
            region if region.starts_with("cn-") => "amazonaws.com.cn",
            region if region.starts_with("eusc-") => "amazonaws.eu",
            region if region.starts_with("us-isob-") => "sc2s.sgov.gov",
            region if region.starts_with("us-iso-") => "c2s.ic.gov",
            region if region.starts_with("eu-isoe-") => "cloud.adc-e.uk",
            region if region.starts_with("us-isof-") => "csp.hci.ic.gov",
            _ => "amazonaws.com",
        };
        format!("{account}.dkr.ecr.{region}.{suffix}")
    }

    /// The host of the API that gives out tokens.
    pub fn api_host(&self) -> String {
        match self {
            Self::Private { region, suffix, fips, .. } => {
                let service = if *fips { "ecr-fips" } else { "api.ecr" };
                match suffix.as_str() {
                    // The dual-stack API names are turned round.
                    "on.aws" => format!("{}.{region}.api.aws", if *fips { "ecr-fips" } else { "ecr" }),
                    "on.amazonwebservices.com.cn" => format!("ecr.{region}.api.amazonwebservices.com.cn"),
                    suffix => format!("{service}.{region}.{suffix}"),
                }
            }
            Self::Public => "api.ecr-public.us-east-1.amazonaws.com".to_owned(),
        }
    }

    /// The region whose tokens open this registry. ECR Public gives them out in one region only.
    pub fn token_region(&self) -> &str {
        match self {
            Self::Private { region, .. } => region,
            Self::Public => "us-east-1",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recognise(host: &str) -> Option<Ecr> {
        Ecr::recognise(&host.parse().expect(host))
    }

    #[test]
    fn every_partition_is_recognised_and_has_its_api() {
        for (host, region, api) in [
            ("123456789012.dkr.ecr.us-east-1.amazonaws.com", "us-east-1", "api.ecr.us-east-1.amazonaws.com"),
            (
                "123456789012.dkr.ecr-fips.us-gov-west-1.amazonaws.com",
                "us-gov-west-1",
                "ecr-fips.us-gov-west-1.amazonaws.com",
            ),
            ("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", "cn-north-1", "api.ecr.cn-north-1.amazonaws.com.cn"),
            ("123456789012.dkr-ecr.eu-west-1.on.aws", "eu-west-1", "ecr.eu-west-1.api.aws"),
            ("123456789012.dkr.ecr.us-iso-east-1.c2s.ic.gov", "us-iso-east-1", "api.ecr.us-iso-east-1.c2s.ic.gov"),
            ("public.ecr.aws", "us-east-1", "api.ecr-public.us-east-1.amazonaws.com"),
        ] {
            let ecr = recognise(host).expect(host);
            assert_eq!((ecr.token_region(), ecr.api_host().as_str()), (region, api), "{host}");
        }
    }

    #[test]
    fn a_name_that_only_looks_like_ecr_gets_no_token() {
        for host in [
            "docker.io",
            "12345678901.dkr.ecr.us-east-1.amazonaws.com",
            "123456789012.dkr.ecr.us-east-1.amazonaws.com.evil.example",
            "123456789012.dkr.ecr.us-east-1.evil.com",
            "123456789012.dkr.ecrx.us-east-1.amazonaws.com",
            "123456789012.dkr.ecr.amazonaws.com",
            "public.ecr.aws.evil.example",
            "123456789012.dkr.ecr.us-east-1.amazonaws.com:5000",
        ] {
            assert_eq!(recognise(host), None, "{host}");
        }
    }

    #[test]
    fn the_default_host_is_recognised_again() {
        for region in ["us-east-1", "cn-north-1", "us-iso-east-1", "us-isob-east-1", "eusc-de-east-1", "us-gov-west-1"]
        {
            let host = Ecr::host("123456789012", region);
            assert_eq!(recognise(&host).map(|ecr| ecr.token_region().to_owned()), Some(region.to_owned()));
        }
    }
}
