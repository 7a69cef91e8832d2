"""What the report cites."""

from typing import Final

# key: (as it stands in a sentence, as it stands in the list at the end)
SOURCES: Final[dict[str, tuple[str, str]]] = {
    "bergstra": (
        "Bergstra et al. 2011",
        "J. Bergstra, R. Bardenet, Y. Bengio and B. Kégl. Algorithms for hyper-parameter optimization. Advances in "
        "Neural Information Processing Systems 24, 2011.",
    ),
    "bonett": (
        "Bonett and Price 2012",
        "D. G. Bonett and R. M. Price. Adjusted Wald confidence interval for a difference of binomial proportions "
        "based on paired data. Journal of Educational and Behavioral Statistics 37(4), 479–488, 2012.",
    ),
    "golovin": (
        "Golovin et al. 2017",
        "D. Golovin, B. Solnik, S. Moitra, G. Kochanski, J. Karro and D. Sculley. Google Vizier: a service for "
        "black-box optimization. KDD, 2017.",
    ),
    "guo": (
        "Guo et al. 2017",
        "C. Guo, G. Pleiss, Y. Sun and K. Q. Weinberger. On calibration of modern neural networks. ICML, 2017.",
    ),
    "hu": (
        "Hu et al. 2021",
        "E. J. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang and W. Chen. LoRA: low-rank adaptation of "
        "large language models. arXiv:2106.09685, 2021.",
    ),
    "hutter": (
        "Hutter et al. 2014",
        "F. Hutter, H. Hoos and K. Leyton-Brown. An efficient approach for assessing hyperparameter importance. ICML, "
        "2014.",
    ),
    "loshchilov": (
        "Loshchilov and Hutter 2019",
        "I. Loshchilov and F. Hutter. Decoupled weight decay regularization. ICLR, 2019.",
    ),
    "mcnemar": (
        "McNemar 1947",
        "Q. McNemar. Note on the sampling error of the difference between correlated proportions or percentages. "
        "Psychometrika 12(2), 153–157, 1947.",
    ),
    "wilson": (
        "Wilson 1927",
        "E. B. Wilson. Probable inference, the law of succession, and statistical inference. Journal of the American "
        "Statistical Association 22(158), 209–212, 1927.",
    ),
    "zhang": (
        "Zhang et al. 2015",
        "X. Zhang, J. Zhao and Y. LeCun. Character-level convolutional networks for text classification. Advances in "
        "Neural Information Processing Systems 28, 2015.",
    ),
}
