from phoque.cli import main

main()
